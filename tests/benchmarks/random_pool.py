"""Time to make a random pool's numbers, beside ``torch.randn`` of as many. Prints a table and, last, one JSON line.

The two are measured in turn, in one process, and compared by their medians. With ``--base``, also beside the time that
``from_pretrained`` takes for a causal language model of 1.1 billion parameters in bfloat16 (TinyLlama's shape, weights
that are not initialised), whose files have just been written, so that they are read from memory: the best case for the
base. The pool has the default sites and is in bfloat16 too.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time

import numpy
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from peft_xmask.core.sites import Site
from peft_xmask.pool import AdapterPool


def seconds(make):
    gc.collect()
    start = time.perf_counter()
    made = make()
    passed = time.perf_counter() - start
    del made
    return passed


def beside_a_base(options):
    """Medians of loading a base, and of making the pool for it."""
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
        vocab_size=32000, dtype="bfloat16",
    )  # fmt: skip
    sites = [Site(f"site.{i}", config.hidden_size, config.hidden_size) for i in range(config.num_hidden_layers)]
    pool = AdapterPool.random(options.num_adapters, options.bottleneck_size, dtype=torch.bfloat16)
    loads, makes = [], []
    with tempfile.TemporaryDirectory() as folder:
        with no_init_weights():
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        for _ in range(options.rounds + 1):
            loads.append(seconds(lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)))
            makes.append(seconds(lambda: pool.bind(sites)))
    return statistics.median(loads[1:]), statistics.median(makes[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-adapters", type=int, default=100)
    parser.add_argument("--bottleneck-size", type=int, default=12)
    parser.add_argument("--sites", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--base", action="store_true", help="beside loading a base as well; 5 GB of memory, 2 of disk")
    options = parser.parse_args()

    sites = [Site(f"site.{i}", options.width, options.width) for i in range(options.sites)]
    pool = AdapterPool.random(options.num_adapters, options.bottleneck_size)
    numbers = 2 * options.sites * options.num_adapters * options.bottleneck_size * options.width
    candidates = {"AdapterPool.random(...).bind": lambda: pool.bind(sites), "torch.randn": lambda: torch.randn(numbers)}

    for make in candidates.values():
        seconds(make)
    times = {name: [] for name in candidates}
    for _ in range(options.rounds):
        for name, make in candidates.items():
            times[name].append(seconds(make))

    print(f"{numbers / 1e6:.1f} M numbers, {torch.get_num_threads()} threads, {options.rounds} rounds")
    print(f"torch {torch.__version__}, numpy {numpy.__version__}")
    print(f"{'':30} {'median s':>9} {'best s':>9} {'M/s':>9}")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:30} {median:9.3f} {min(values):9.3f} {numbers / median / 1e6:9.0f}")
    ours, theirs = (statistics.median(values) for values in times.values())
    base = {}
    if options.base:
        load, make = beside_a_base(options)
        print(f"a base of 1.1 B parameters: {load:.2f} s; its pool: {make:.2f} s, {make / load:.2f} of it")
        base = {
            "base_load_seconds": round(load, 3),
            "pool_seconds": round(make, 3),
            "pool_over_load": round(make / load, 3),
        }
    print(
        json.dumps(
            {
                "benchmark": "random_pool",
                "numbers": numbers,
                "threads": torch.get_num_threads(),
                "seconds": round(ours, 4),
                "torch_randn_seconds": round(theirs, 4),
                "ratio": round(ours / theirs, 3),
                "limit": 2.0,
                **base,
            }
        )
    )


if __name__ == "__main__":
    main()
