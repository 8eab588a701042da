"""Cells of a table of people: reads texts, labels, people and times, and collects every cell that is unusable."""

from __future__ import annotations

import math
from typing import Any

from ..bank.names import check_name
from ..errors import ConfigError, FileFormatError

PARTS = ("train", "validation", "test")
_SHOWN = 5
_SYNONYMS = {"dev": "validation", "valid": "validation", "val": "validation", "eval": "test"}


class CellProblems:
    """Collects unusable cells while a table is read; the message names the first ones by row and column."""

    def __init__(self, source: str) -> None:
        self.source, self.found, self.count = source, list[str](), 0

    def add(self, row: int, column: str, expected: str, cell: object) -> None:
        """Record a cell that is not what was expected."""
        self.count += 1
        if len(self.found) < _SHOWN:
            shown = "nothing" if cell is None else f"{cell!r:.60}"
            self.found.append(f"row {row}, column '{column}': expected {expected}, found {shown}")

    def raise_any(self) -> None:
        """Raise :class:`~peft_xmask.errors.FileFormatError` if any cell was recorded."""
        if self.count:
            more = f"; and {self.count - len(self.found):,} more" if self.count > len(self.found) else ""
            raise FileFormatError(
                f"{self.source} has {self.count:,} unusable cell{'s' if self.count > 1 else ''}: "
                f"{'; '.join(self.found)}{more}. Fill in or remove these rows; row 1 is the first below a header."
            )

    def text(self, row: int, column: str, cell: object) -> str:
        """The text in a cell; empty if there is none."""
        if isinstance(cell, str) and cell.strip():
            return cell
        self.add(row, column, "a text", cell)
        return ""

    def person(self, row: int, column: str, cell: object) -> str:
        """The name in a cell; empty if it is invalid."""
        name = str(cell) if isinstance(cell, int) and not isinstance(cell, bool) else cell
        try:
            check_name(name)
        except ConfigError:
            long = "a name of 1 to 1,024 bytes other than '__base__'"
            self.add(row, column, long if isinstance(name, str) else "a name or a whole number", cell)
            return ""
        return str(name)

    def part(self, row: int, column: str, cell: object) -> str:
        """The part (train, validation or test) that a cell names."""
        name = cell.strip().lower() if isinstance(cell, str) else cell
        name = _SYNONYMS.get(name, name) if isinstance(name, str) else name
        if name not in PARTS:
            self.add(row, column, "train, validation or test", cell)
        return str(name)

    def time(self, row: int, column: str, cell: object, first: object) -> None:
        """Check that a cell can be ordered with that of row 1."""
        number = (int, float)
        alike = isinstance(cell, number) and isinstance(first, number)
        if not (alike or (type(cell) is type(first) and cell is not None)):
            self.add(row, column, f"a time like that of row 1 ({first!r:.40})", cell)


def label_in(problems: CellProblems, task: str, row: int, column: str, cell: object) -> Any:
    """The label in a cell: a name, a number, a tuple of names, or for a language model the text to complete with."""
    if task == "causal-lm":
        return problems.text(row, column, cell)
    if task == "regression":
        try:
            value = math.nan if isinstance(cell, bool) else float(cell)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            problems.add(row, column, "a finite number", cell)
        return value
    if task == "multi-label":
        cells = cell.split("|") if isinstance(cell, str) else cell
        if cell is None:
            return ()
        if isinstance(cells, list) and all(_name(each) is not None for each in cells):
            return tuple(str(_name(each)) for each in cells)
        problems.add(row, column, "a list of labels, or labels between '|'", cell)
        return ()
    name = _name(cell)
    if name is None:
        problems.add(row, column, "a label (a string or a whole number)", cell)
    return name


def _name(cell: object) -> str | None:
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    if isinstance(cell, bool | int):
        return str(cell)
    return cell.strip() if isinstance(cell, str) and cell.strip() else None
