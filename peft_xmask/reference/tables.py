"""Tables as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any


def cell(value: Any) -> str:
    """A value for people."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [[title.replace("|", "\\|") for title in titles], ["---"] * len(titles)]
    lines += [[cell(value).replace("|", "\\|").replace("\n", " ") for value in row] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def csv_table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as comma-separated values, numbers as they are."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(titles)
    writer.writerows([["" if value is None else value for value in row] for row in rows])
    return stream.getvalue()
