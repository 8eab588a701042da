"""Kept lines of the benchmark on people, what is chosen by them, and tables."""

import json
import statistics
from pathlib import Path

from rich.table import Table
from timing import out

RESULTS = Path(__file__).resolve().parent / "results"
ALL = 1000
COLUMNS = (5, 20, 40, ALL)
SEEDS = 3
TRIED = "common + offset, slope + few numbers"
"""The row by which the prior of few directions is chosen, for masks too."""
MEASURES = {"arguments": ("nats", "accuracy"), "irony": ("nats", "accuracy"), "films": ("absolute error",)}


class Lines:
    """Trainings of one set, in a file that only grows."""

    def __init__(self, name):
        self.name = name
        self.path = RESULTS / f"people-{name}.jsonl"
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        self.lines = [json.loads(line) for line in text.splitlines()]

    def find(self, **wanted):
        return [line for line in self.lines if all(line.get(key) == value for key, value in wanted.items())]

    def keep(self, line):
        self.lines.append(line)
        RESULTS.mkdir(exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def priors(self, row, seed):
        """Prior variances of the offset below a row: the best over all numbers of labels, on people not held out."""
        name = "common + offset, slope" if row.common else "base + offset"
        return tuple(map(float, self.prior_cell(name, seed).split("/")))

    def prior_cell(self, name, seed):
        """One for all numbers of labels."""
        if "few" in name:
            return prior_elsewhere(self.name)
        found = self.find(seed=seed, part="tune", row=name)
        return min(found[0]["grid"], key=lambda key: sum(line["grid"][key][0] for line in found))

    def chosen_rate(self, name, seed, labels, rates):
        if len(rates) == 1:
            return rates[0]
        return min(rates, key=lambda rate: min(self.tuned(name, seed, labels, rate).values()))

    def tuned(self, name, seed, labels, rate):
        """By cell, the figure and a standard error of its difference to what is below: a layer must earn its place."""
        found = self.find(seed=seed, part="tune", row=name, labels=labels, rate=rate)
        return {key: cell[0] + cell[2] for key, cell in found[0]["grid"].items()}

    def result(self, name, seed, labels):
        """Of held-out people: ``(cell chosen on others, its figures, the line)``, or None if it was not measured."""
        found = self.find(seed=seed, part="held", row=name, labels=labels)
        if not found:
            return None
        line = found[0]
        if line["rate"] == 0.0:
            key = self.prior_cell(name, seed)
        else:
            tuned = self.tuned(name, seed, labels, line["rate"])
            key = min(tuned, key=tuned.get)
        return key, line["grid"][key], line


def prior_elsewhere(name):
    """Number of directions and variance that are best on the two other sets: mean relative change of their figure."""
    change = {}
    for other in MEASURES:
        if other != name:
            for line in Lines(other).find(part="tune", row=TRIED):
                for key, cell in line["grid"].items():
                    change.setdefault(key, []).append(cell[0] / line["grid"]["0/0"][0])
    return min(change, key=lambda key: statistics.mean(change[key]))


def below(lines, name, seed, labels):
    """Figures without what the row adds."""
    return lines.result(name, seed, labels)[2]["grid"]["0/0"]


def spread(values):
    return f"{statistics.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def table_rows(name, rows, plain=True):
    """For each row ``(row, bytes, figures by column and seed)``; the layers without anything personal come first."""
    lines = Lines(name)
    plain = (
        () if not plain else (("no text", "no text + offset"), ("base", "base + offset"), ("common", "common + offset"))
    )
    for called, of in plain:
        if of in rows:
            cells = {n: [below(lines, of, s, n) for s in range(SEEDS) if lines.result(of, s, n)] for n in COLUMNS}
            yield called, 0, cells
    for called in rows:
        found = {n: [lines.result(called, s, n) for s in range(SEEDS)] for n in COLUMNS}
        kept = {n: [each[1] for each in results if each] for n, results in found.items()}
        if any(kept.values()):
            size = next(each[2]["payload_bytes"] for results in found.values() for each in results if each)
            if ", slope + " in called:
                size += Lines(name).find(row="common + offset, slope")[0]["payload_bytes"]
            yield called, size, kept


def show(name, rows):
    facts = {}
    for index, measure in enumerate(MEASURES[name]):
        table = Table(title=f"{name}: {measure}, held-out people, by labels")
        for column in ("row", "bytes", *(f"{n}" if n != ALL else "all" for n in COLUMNS)):
            table.add_column(column, justify="left" if column == "row" else "right")
        for called, size, cells in table_rows(name, rows):
            numbers = {n: [cell[index] for cell in cells[n]] for n in COLUMNS}
            table.add_row(called, f"{size:,}", *(spread(numbers[n]) if numbers[n] else "" for n in COLUMNS))
            facts.setdefault(called, {})[measure] = {str(n): numbers[n] for n in COLUMNS}
        out().print(table)
    return facts


def markdown(name, rows, index=0, adds=False):
    """A Markdown table of one set.

    Args:
        index: which of the set's measures.
        adds: the difference to the layers below instead, seed by seed.
    """
    head = " | ".join(f"{n} labels" if n != ALL else "all" for n in COLUMNS)
    made = [f"| {name}: {MEASURES[name][index]} | bytes | {head} |", f"| --- | --: |{' --: |' * len(COLUMNS)}"]
    lines = Lines(name)
    for called, size, cells in table_rows(name, rows, plain=not adds):
        columns = []
        for n in COLUMNS:
            numbers = [cell[index] for cell in cells[n]] if len(cells[n]) == SEEDS else []
            if adds and numbers:
                numbers = [number - below(lines, called, s, n)[index] for s, number in enumerate(numbers)]
            columns.append((change if adds else spread)(numbers) if numbers else "")
        if any(columns):
            made.append(f"| {called} | {size:,} | {' | '.join(columns)} |")
    return "\n".join(made)


def change(values):
    """``mean (lowest to highest)`` with signs."""
    return f"{statistics.mean(values):+.3f} ({min(values):+.3f} to {max(values):+.3f})"
