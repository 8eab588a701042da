"""Tables as Markdown, CSV and a page of HTML."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from html import escape
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


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --head: #8882; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1rem; }
h1 { font-size: 1.25rem; margin: 0 0 .3rem; }
p { max-width: 60rem; margin: .3rem 0 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
th, th:first-child { background: color-mix(in srgb, CanvasText 8%, Canvas); padding: 0; }
th button { all: unset; cursor: pointer; padding: .35rem .6rem; font-weight: 600; }
th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
td.text { text-align: left; white-space: normal; min-width: 12rem; }
@media (max-width: 40rem) {
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table, tbody { display: block; }
  tr { display: block; border: 1px solid var(--line); border-radius: .4rem; margin-bottom: .8rem; }
  td, td.text { display: flex; justify-content: space-between; gap: 1rem; text-align: right; white-space: normal;
    overflow-wrap: anywhere; min-width: 0; }
  td:first-child, td.text:first-child { display: block; position: static; text-align: left; font-weight: 600;
    background: var(--head); }
  td:not(:first-child)::before { content: attr(data-title); text-align: left; opacity: .75; }
  label.sort { display: block; margin-bottom: .8rem; }
}
@media (min-width: 40.01rem) { label.sort { display: none; } }
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


def html_page(title: str, note: str, titles: Sequence[str], rows: Iterable[Sequence[tuple[Any, str]]]) -> str:
    """A page that needs nothing else: its table sorts by a click on a title, and is a list of cards on a phone.

    Args:
        title: of the page.
        note: a paragraph above the table.
        titles: of the columns; the first names a row.
        rows: for each cell the value it sorts by, and its text.
    """
    head = "".join(f'<th scope="col" aria-sort="none"><button>{escape(name)}</button></th>' for name in titles)
    options = "".join(f'<option value="{index}">{escape(name)}</option>' for index, name in enumerate(titles))
    lines = "".join(f"<tr>{''.join(map(_html_cell, titles, row))}</tr>\n" for row in rows)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f'<p>{escape(note)}</p>\n<label class="sort">Sort by <select>{options}</select></label>\n'
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}</tbody>\n</table></div>\n'
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _html_cell(title: str, given: tuple[Any, str]) -> str:
    value, text = given
    kind = "" if isinstance(value, (int, float)) or value is None else ' class="text"'
    key = "" if value is None else str(value)
    return f'<td{kind} data-title="{escape(title)}" data-value="{escape(key)}">{escape(text)}</td>'
