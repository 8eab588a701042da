"""Finished trainings of the quality benchmark: a JSON line each, and those of the rate that won."""

import json
from pathlib import Path

from quality_tasks import TASKS

RESULTS = Path(__file__).resolve().parent / "results"


class Cells:
    """Finished trainings of one task, in a file that only grows."""

    def __init__(self, task):
        self.task, self.path = task, RESULTS / f"quality-{task}.jsonl"
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        self.lines = [json.loads(line) for line in text.splitlines() if line.strip()]

    def find(self, **wanted):
        wanted = {"steps": TASKS[self.task].steps, **wanted}
        return [line for line in self.lines if all(line.get(name) == value for name, value in wanted.items())]

    def keep(self, line):
        self.lines.append(line)
        RESULTS.mkdir(exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def best(self, name):
        """The line of seed 0 that won by validation accuracy, the first of equals; None if there is none."""
        tried = [line for line in self.find(method=name, seed=0) if "test_accuracy" in line]
        return max(tried, key=lambda line: line["validation_accuracy"], default=None)


def chosen(task, methods, seeds):
    """Lines of the rate that won, a list of seeds for each method that has all of them."""
    cells, found = Cells(task), {}
    for name in methods:
        best = cells.best(name)
        if best is None:
            continue
        lines = [line for seed in range(seeds) for line in cells.find(method=name, rate=best["rate"], seed=seed)]
        if len(lines) == seeds:
            found[name] = lines
    return found
