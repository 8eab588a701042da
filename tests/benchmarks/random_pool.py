"""Time to make a random pool's numbers, beside ``torch.randn`` of as many. Prints a table and, last, one JSON line.

The two are measured in turn, in one process, and compared by their medians. With ``--base``, also beside the time that
``from_pretrained`` takes for a causal language model of 1.1 billion parameters in bfloat16 (TinyLlama's shape, weights
that are not initialised). The pool has the default sites and is in bfloat16 too. ``from_pretrained`` only maps the
files, so "read" is until every page of the weights has been touched: once from the disk, after the system was told to
forget the files, and once from the system's memory.
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from peft_xmask.core.sites import Site
from peft_xmask.pool import AdapterPool

PAGE = 2048  # numbers of two bytes in a page


def seconds(make):
    gc.collect()
    start = time.perf_counter()
    made = make()
    passed = time.perf_counter() - start
    del made
    return passed


def forget(folder):
    """Let the system drop what it keeps of a folder's files in memory."""
    for path in Path(folder).iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def beside_a_base(options):
    """Median seconds of loading a base in several ways, and of making the pool for it."""
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
        vocab_size=32000, dtype="bfloat16",
    )  # fmt: skip
    sites = [Site(f"site.{i}", config.hidden_size, config.hidden_size) for i in range(config.num_hidden_layers)]
    pool = AdapterPool.random(options.num_adapters, options.bottleneck_size, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        with no_init_weights():
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)

        def load():
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

        def read():
            return [float(weight.detach().view(-1)[::PAGE].sum()) for weight in load().parameters()]

        times = {"mapped": [], "read from memory": [], "read from the disk": [], "pool": []}
        for _ in range(options.rounds + 1):
            forget(folder)
            times["read from the disk"].append(seconds(read))
            times["read from memory"].append(seconds(read))
            times["mapped"].append(seconds(load))
            times["pool"].append(seconds(lambda: pool.bind(sites)))
    return {name: round(statistics.median(each[1:]), 3) for name, each in times.items()}


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
        base = beside_a_base(options)
        print("seconds of a base of 1.1 B parameters, and of its pool:", base)
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
                "base": base,
            }
        )
    )


if __name__ == "__main__":
    main()
