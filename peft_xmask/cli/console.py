"""Output of all commands: results on standard output, progress and errors on standard error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

output = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


@contextmanager
def progress_bar(title: str, total: int | None = None) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error; yields a function of the steps done and their total.

    Without a total the bar only shows that work goes on. Where no terminal reads it, one line says what starts.
    """
    if not errors.is_terminal:
        errors.print(f"{title} ...", markup=False, soft_wrap=True)
        yield lambda done, of: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors) as bar:
        task = bar.add_task(escape(title), total=total)
        yield lambda done, of: bar.update(task, completed=done, total=of)


def print_facts(facts: Mapping[str, object], title: str | None = None) -> None:
    """Print names and values as two columns; values that are None are left out."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value is not None:
            table.add_row(escape(name), escape(str(value)))
    output.print(table)


def print_json(data: object) -> None:
    """Print JSON for machines: plain text on standard output."""
    output.print(json.dumps(data, indent=2, ensure_ascii=False), markup=False, soft_wrap=True)


def bytes_text(count: int | None) -> str | None:
    """A number of bytes for people: exact, with a rounded unit when it is large."""
    if count is None:
        return None
    if count < 10_000:
        return f"{count:,} B"
    size, unit = (count / 1e6, "MB") if count >= 1_000_000 else (count / 1e3, "kB")
    return f"{count:,} B ({size:.3g} {unit})"


def new_folder(path: Path, marker: str) -> Path:
    """Make a folder to write results to.

    Raises:
        ConfigError: it already holds results, that is, a file named ``marker``.
        OSError: it cannot be created.
    """
    from ..errors import ConfigError

    if (path / marker).exists():
        raise ConfigError(f"'{path}' already holds a {marker}. Choose another folder for --out, or remove it first.")
    path.mkdir(parents=True, exist_ok=True)
    return path
