"""Tables of the quality benchmark, drawn from its kept lines: on a screen, or in Markdown for the documentation."""

import statistics

from quality_cells import chosen
from quality_tasks import TASKS
from rich.table import Table
from timing import out

POOL_USERS = {"1": 1, "1k": 1_000, "1M": 1_000_000}
"""Profiles among which a pool that has to be shipped is shared, for its bytes in the table."""


def spread(scores):
    """``mean (lowest-highest)``, three digits."""
    return f"{statistics.mean(scores):.3f} ({min(scores):.3f}-{max(scores):.3f})"


def tests(lines):
    return [line["test_accuracy"] for line in lines]


def end_loss(lines):
    """Training loss of the last 15 % of the steps, in nats, mean over seeds; None where nothing was trained."""
    ends = [statistics.mean(line["losses"][-3:]) for line in lines if line["losses"]]
    return round(statistics.mean(ends), 3) if ends else None


def facts(lines):
    """What a method's lines say, for the JSON line."""
    return {
        "payload_bytes": lines[0]["payload_bytes"], "head_bytes": lines[0]["head_bytes"],
        "pool_bytes": lines[0]["pool_bytes"], "rate": lines[0]["rate"],
        "validation": round(statistics.mean(line["validation_accuracy"] for line in lines), 4),
        "test": round(statistics.mean(tests(lines)), 4), "seeds": tests(lines), "loss": end_loss(lines),
    }  # fmt: skip


def report(task, methods, seeds):
    """Print the table of a task; its figures."""
    about = TASKS[task]
    what = f"{task}: {about.dataset}{', ' + about.domain if about.domain else ''}, head: {about.head}"
    table = Table(title=f"{what}; {about.steps} steps of {about.batch_size}, {seeds} seeds")
    shared = [f"+pool/{count}" for count in POOL_USERS]
    for column in ("method", "payload", "+head", *shared, "rate", "loss", "validation", "test", "lowest", "highest"):
        table.add_column(column, justify="left" if column == "method" else "right")
    found = {}
    for name, lines in chosen(task, methods, seeds).items():
        fact = found[name] = facts(lines)
        payload, pool = fact["payload_bytes"], fact["pool_bytes"]
        with_pool = [f"{payload + pool / count:,.0f}" if pool else "" for count in POOL_USERS.values()]
        scores = fact["test"], min(fact["seeds"]), max(fact["seeds"])
        table.add_row(
            name, f"{payload:,}", f"{payload + fact['head_bytes']:,}", *with_pool, f"{fact['rate']:g}",
            "" if fact["loss"] is None else f"{fact['loss']:.2f}",
            *(f"{number:.3f}" for number in (fact["validation"], *scores)),
        )  # fmt: skip
    out().print(table)
    return found


def markdown(tasks, methods, seeds, losses=False):
    """A Markdown table: a row a method, by bytes; a column a task, with ``mean (lowest-highest)`` of test accuracy.

    Args:
        methods: by task.
        losses: whether a column has the training loss at the end, in nats.
    """
    found = {task: chosen(task, methods[task], seeds) for task in tasks}
    names = list(dict.fromkeys(name for task in tasks for name in methods[task]))
    columns = [column for task in tasks for column in ([task, f"{task}: loss"] if losses else [task])]
    rows = [f"| method | bytes | {' | '.join(columns)} |", f"| --- | --: |{' --: |' * len(columns)}"]
    measured = {name: [found[task][name] for task in tasks if name in found[task]] for name in names}
    sizes = {name: parts[0][0]["payload_bytes"] for name, parts in measured.items() if parts}
    for name in sorted(sizes, key=sizes.get):
        lines = {task: found[task].get(name) for task in tasks}
        cells = []
        for part in lines.values():
            cells.append(spread(tests(part)) if part else "")
            if losses:
                cells.append("" if (loss := end_loss(part)) is None else f"{loss:.2f}")
        rows.append(f"| {name} | {sizes[name]:,} | {' | '.join(cells)} |")
    return "\n".join(rows)
