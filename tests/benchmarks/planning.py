"""What docs/planning.md takes from a measurement: bytes of memory for a name while banks are merged, and for metrics.

Half of the profiles lie in each of two banks, which are merged from file to file; then their metrics are read from the
file that ``train_profiles`` writes. Bytes are those of Python objects: of names at their most, of metrics when they are
there. Prints both and one JSON line.
"""

import argparse
import tempfile
import tracemalloc
from pathlib import Path

from profiles_at_scale import bank_of, base_of
from timing import out, print_json

from peft_xmask import ProfileBank
from peft_xmask.training.trained_bank import read_metrics, write_metrics


def traced(run):
    """What a call gives, bytes of Python objects that it leaves behind, and the most that there were."""
    tracemalloc.start()
    found = run()
    left, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return found, left, most


def measured(index):
    return {
        "examples": 20 + index % 7,
        "validation_examples": 4 + index % 3,
        "validation_loss": 0.1 + index / 1e6,
        "best_step": 300 + index % 100,
        "stopped_step": None,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profiles", type=int, default=1_000_000)
    options = parser.parse_args()
    base, half = base_of("minilm"), options.profiles // 2
    with tempfile.TemporaryDirectory() as work:
        folders = [Path(work) / "first", Path(work) / "second"]
        for folder, first in zip(folders, (0, half), strict=True):
            bank_of(base, half, first).save_pretrained(folder)
        merged, _, merging = traced(lambda: ProfileBank.merge(folders, Path(work) / "merged"))
        write_metrics({name: measured(index) for index, name in enumerate(merged)}, Path(work))
        read, metrics, _ = traced(lambda: read_metrics(Path(work)))
    facts = {"profiles": len(read), "merging": merging / len(read), "metrics": metrics / len(read)}
    out().print(
        f"{len(read):,} profiles: {facts['merging']:.0f} bytes of memory a name while banks are merged, "
        f"{facts['metrics']:.0f} bytes a profile's metrics"
    )
    print_json({"benchmark": "planning", **facts})


if __name__ == "__main__":
    main()
