"""Kept lines of the GRPO benchmark, its tables, and the plot of reward against steps."""

import json
import statistics
from pathlib import Path

from rich.table import Table
from timing import out

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = ("before", "reward", "nats per token")


class Lines:
    """Trainings, in a file that only grows."""

    def __init__(self):
        self.path = RESULTS / "grpo.jsonl"
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        self.lines = [json.loads(line) for line in text.splitlines()]

    def find(self, **wanted):
        return [line for line in self.lines if all(line.get(key) == value for key, value in wanted.items())]

    def keep(self, line):
        self.lines.append(line)
        RESULTS.mkdir(exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def best(self, reward, called):
        """The line of seed 0 whose rate has the best validation reward."""
        return max(self.find(reward=reward, method=called, seed=0), key=lambda line: line["validation"])

    def chosen(self, reward, seeds):
        """By method, lines of the best rate, one for each seed that has been run; those with the fewest bytes first."""
        found = {}
        for called in dict.fromkeys(line["method"] for line in self.find(reward=reward)):
            rate = self.best(reward, called)["rate"]
            lines = [line for line in self.find(reward=reward, method=called, rate=rate) if line["seed"] < seeds]
            found[called] = sorted(lines, key=lambda line: line["seed"])
        return dict(sorted(found.items(), key=lambda pair: pair[1][0]["payload_bytes"]))


def cells(lines):
    """Reward before, reward after, and nats a token, each ``mean (lowest-highest)``."""
    return [spread([line[key] for line in lines]) for key in ("before", "test", "nats")]


def spread(values):
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def show(reward, seeds):
    """Print the table of one reward; its figures."""
    table, facts = Table(title=f"GRPO, reward: {reward}, {seeds} seeds"), {}
    for column in ("method", "bytes", "rate", "seeds", *COLUMNS):
        table.add_column(column, justify="left" if column == "method" else "right")
    for called, lines in Lines().chosen(reward, seeds).items():
        size, rate = lines[0]["payload_bytes"], lines[0]["rate"]
        table.add_row(called, f"{size:,}", f"{rate:g}", str(len(lines)), *cells(lines))
        facts[called] = [line["test"] for line in lines]
    out().print(table)
    return facts


def markdown(reward, seeds=3):
    """The same in Markdown."""
    rows = [f"| {reward} | bytes | seeds | {' | '.join(COLUMNS)} |", f"| --- | --: | --: |{' --: |' * len(COLUMNS)}"]
    for called, lines in Lines().chosen(reward, seeds).items():
        rows.append(f"| {called} | {lines[0]['payload_bytes']:,} | {len(lines)} | {' | '.join(cells(lines))} |")
    return "\n".join(rows)


def draw(folder, reward, seeds):
    """Write ``grpo-REWARD.svg``: the mean reward over seeds of each part of the training."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for number, (called, lines) in enumerate(Lines().chosen(reward, seeds).items()):
        label = f"{called}, {lines[0]['payload_bytes']:,} bytes"
        if not lines[0]["curve"]:
            axes.axhline(statistics.mean(line["test"] for line in lines), color="grey", linestyle=":", label=called)
            continue
        parts = list(zip(*(line["curve"] for line in lines), strict=True))
        width = lines[0]["steps"] / len(parts)
        steps = [width * (index + 0.5) for index in range(len(parts))]
        axes.plot(steps, [statistics.mean(part) for part in parts], color=f"C{number}", label=label)
        axes.fill_between(steps, [min(p) for p in parts], [max(p) for p in parts], color=f"C{number}", alpha=0.12)
    axes.set_xlabel("steps of 32 completions")
    axes.set_ylabel("reward in training: mean and range over seeds")
    axes.set_title(reward)
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left", fontsize=7)
    figure.savefig(folder / f"grpo-{reward.replace(' ', '-')}.svg", metadata={"Date": None})
    plt.close(figure)
