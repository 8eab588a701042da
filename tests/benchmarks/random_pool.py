"""Time to make a random pool's numbers, beside ``torch.randn`` of as many. Prints a table and, last, one JSON line.

The two are measured in turn, in one process, and compared by their medians.
"""

import argparse
import gc
import json
import statistics
import time

import numpy
import torch

from peft_xmask.core.sites import Site
from peft_xmask.pool import AdapterPool


def seconds(make):
    gc.collect()
    start = time.perf_counter()
    made = make()
    passed = time.perf_counter() - start
    del made
    return passed


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-adapters", type=int, default=100)
    parser.add_argument("--bottleneck-size", type=int, default=48)
    parser.add_argument("--sites", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=7)
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
            }
        )
    )


if __name__ == "__main__":
    main()
