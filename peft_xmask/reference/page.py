"""A comparison as a page of HTML: what was measured, what the columns mean, and what could not be measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any


@dataclass(frozen=True)
class Column:
    """A column of the page's table.

    Attributes:
        title: of the column.
        meaning: a sentence for the list below the table.
        bars: how long the bars behind the cells are: ``"linear"`` or ``"log"`` in the value; empty: no bars.
    """

    title: str
    meaning: str
    bars: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell of the page's table.

    Attributes:
        value: by which it sorts and which its bar shows; None: not measured.
        text: what it shows.
        exact: what it shows when pointed at; empty: nothing.
    """

    value: float | int | str | None
    text: str
    exact: str = ""


def shortened(value: float | int | None, unit: str = "") -> Cell:
    """A number with three digits and a prefix (k, M, G, T), exact when pointed at.

    Args:
        value: None: not measured.
        unit: such as ``"B"``.
    """
    if value is None:
        return Cell(None, "-")
    exact = f"{value:,} {unit}".strip() if isinstance(value, int) else f"{value:,.6g} {unit}".strip()
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return Cell(value, f"{value / size:.3g} {prefix}{unit}", exact)
    return Cell(value, f"{value:.3g} {unit}".strip(), exact)


def comparison_page(
    title: str,
    lead: str,
    note: str,
    columns: Sequence[Column],
    rows: Sequence[Sequence[Cell]],
    left_out: Mapping[str, str],
) -> str:
    """A page that needs no other file. Its table sorts by a click on a title; on a phone each row is a card.

    Args:
        title: of the page.
        lead: what the page shows, in a sentence or two.
        note: how it was measured.
        columns: the first names a row.
        rows: a cell for each column.
        left_out: why a method is not in the table, by its name.
    """
    head = "".join(
        f'<th scope="col" aria-sort="none" title="{escape(each.meaning)}"><button>{escape(each.title)}</button></th>'
        for each in columns
    )
    options = "".join(f'<option value="{index}">{escape(each.title)}</option>' for index, each in enumerate(columns))
    reach = [_reach(column, [row[index].value for row in rows]) for index, column in enumerate(columns)]
    lines = "".join(
        f"<tr>{''.join(_cell(*each) for each in zip(columns, row, reach, strict=True))}</tr>\n" for row in rows
    )
    meanings = "".join(f"<dt>{escape(each.title)}</dt><dd>{escape(each.meaning)}</dd>\n" for each in columns[1:])
    missing = ""
    if left_out:
        items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(reason)}</dd>\n" for name, reason in left_out.items())
        missing = f"<section><h2>Not measured</h2><p>They do not fit this base.</p><dl>\n{items}</dl></section>\n"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{escape(title)}</h1>\n<p>{escape(lead)}</p></header>\n"
        "<section>\n"
        '<p class="hint">Click a title to sort. Point at a number for its exact value.</p>\n'
        f'<label class="sort">Sort by <select>{options}</select></label>\n'
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}</tbody>\n</table></div>\n'
        f"</section>\n{missing}"
        f"<section><h2>What the columns mean</h2><dl>\n{meanings}</dl></section>\n"
        f"<section><h2>How it was measured</h2><p>{escape(note)}</p></section>\n"
        f"</main>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _reach(column: Column, values: Sequence[Any]) -> tuple[float, float] | None:
    """The values at which a bar is empty and full; None: there are no bars."""
    numbers = [float(value) for value in values if isinstance(value, (int, float)) and value > 0]
    if not column.bars or not numbers:
        return None
    return (min(numbers) / 3 if column.bars == "log" else 0.0), max(numbers)


def _cell(column: Column, cell: Cell, reach: tuple[float, float] | None) -> str:
    style = ""
    if reach is not None and isinstance(cell.value, (int, float)) and cell.value > 0:
        low, high = reach
        share = math.log(cell.value / low) / math.log(high / low) if column.bars == "log" else cell.value / high
        style = f' style="--share:{100 * share:.1f}%"'
    kind = "text" if isinstance(cell.value, str) else "bar" if style else "number"
    exact = f' title="{escape(cell.exact)}"' if cell.exact else ""
    key = "" if cell.value is None else str(cell.value)
    return (
        f'<td class="{kind}" data-title="{escape(column.title)}" data-value="{escape(key)}"{exact}{style}>'
        f"{escape(cell.text)}</td>"
    )


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #586374; --line: #d9dfe7; --page: #f5f7fa; --card: #fff;
  --bar: #6ea3ec; --accent: #1f5fc4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8edf4; --soft: #9aa7b8; --line: #2c3644; --page: #10151c; --card: #182029; --bar: #3b6db3;
    --accent: #79b0ff; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.2rem; display: grid; gap: 1rem;
  grid-template-columns: minmax(0, 1fr); }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .4rem 0 .3rem; } h2 { font-size: 1.05rem; margin: 0 0 .4rem; }
p { margin: 0; max-width: 60rem; } .hint, section > p { color: var(--soft); }
section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem; }
.hint { font-size: .85rem; margin-bottom: .6rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .5rem; border-bottom: 1px solid var(--line); text-align: right; }
td { white-space: nowrap; }
th { vertical-align: bottom; padding: 0; font-size: .82rem; line-height: 1.25; color: var(--soft); }
th button { all: unset; display: block; width: 100%; box-sizing: border-box; cursor: pointer;
  padding: .4rem .5rem; font-weight: 600; }
th button:hover { color: var(--accent); } th button:focus-visible { outline: 2px solid var(--accent); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--card); }
td:first-child { font-weight: 600; white-space: normal; overflow-wrap: anywhere; min-width: 13rem; }
td.bar { min-width: 6.5rem; background: linear-gradient(to left, var(--bar) var(--share), transparent var(--share))
  right bottom / 100% 4px no-repeat; }
dl { margin: 0; display: grid; grid-template-columns: minmax(9rem, max-content) minmax(0, 1fr); gap: .35rem 1rem; }
dt { font-weight: 600; overflow-wrap: anywhere; } dd { margin: 0; color: var(--soft); overflow-wrap: anywhere; }
section > p + dl { margin-top: .5rem; }
@media (max-width: 40rem) {
  main { padding: .7rem; } section { padding: .8rem; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table, tbody { display: block; }
  tr { display: block; border: 1px solid var(--line); border-radius: .4rem; margin-bottom: .8rem; overflow: hidden; }
  td { display: flex; justify-content: space-between; gap: 1rem; white-space: normal; overflow-wrap: anywhere; }
  td:first-child { display: block; position: static; background: var(--page); }
  td:not(:first-child)::before { content: attr(data-title); text-align: left; color: var(--soft); }
  label.sort { display: block; margin-bottom: .8rem; } .hint { display: none; }
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; } dd { margin-bottom: .6rem; }
}
@media (min-width: 40.01rem) { label.sort { display: none; } }
@media print { body { background: none; } section { border: 0; padding: 0; } .hint { display: none; } }
"""

_SCRIPT = """
const table = document.querySelector("table"), body = table.tBodies[0];
const choice = document.querySelector("select");
function sort(column, descending) {
  const key = row => row.cells[column].dataset.value;
  const rows = [...body.rows].sort((a, b) => {
    const x = key(a), y = key(b);
    if (x === "" || y === "") return (x === "") - (y === "");
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return descending ? -order : order;
  });
  body.append(...rows);
  [...table.tHead.rows[0].cells].forEach((cell, index) =>
    cell.setAttribute("aria-sort", index !== column ? "none" : descending ? "descending" : "ascending"));
}
[...table.tHead.rows[0].cells].forEach((cell, index) =>
  cell.querySelector("button").addEventListener("click", () =>
    sort(index, cell.getAttribute("aria-sort") === "ascending")));
choice.addEventListener("change", () => sort(Number(choice.value), false));
"""
