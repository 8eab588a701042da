"""The map of profiles as a page of HTML: each point says whose it is, and a name finds its point."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape

from ..errors import ConfigError
from .bank import ProfileBank
from .plot import coordinates


def map_page(
    bank: ProfileBank,
    values: Mapping[str, str] | None = None,
    *,
    column: str = "",
    limit: int = 2000,
    names: Sequence[str] = (),
) -> str:
    """A page that needs no other file, with the points of :func:`~peft_xmask.bank.plot.plot_map`.

    Args:
        bank: with at least three profiles.
        values: a value for each name, shown as colour and beside the name.
        column: name of the values.
        limit: most points, chosen at random.
        names: profiles that are among them in any case, and marked.

    Raises:
        ConfigError: fewer than three profiles.
        KeyError: no such profile.
    """
    if min(len(bank), limit) < 3:
        raise ConfigError(f"Expected at least three profiles to draw a map of, found {min(len(bank), limit)}.")
    drawn, points, explained = coordinates(bank, limit, names)
    facts = {
        "points": [
            [name, round(float(x), 4), round(float(y), 4), (values or {}).get(name)]
            for name, (x, y) in zip(drawn, points, strict=True)
        ],
        "marked": list(names),
        "column": column,
    }
    data = json.dumps(facts, ensure_ascii=False).replace("<", "\\u003c")
    title = f"Map of {len(drawn):,} profiles"
    note = (
        "Profiles with similar masks are close to each other: these are the first two principal components of the "
        f"masks, with {explained[0]:.1%} and {explained[1]:.1%} of their variance."
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n<p>{escape(note)}</p>\n"
        '<p><label>Find a name <input id="find" list="names" autocomplete="off"></label>'
        '<datalist id="names"></datalist> <output id="said">Point at a profile, or touch it.</output></p>\n'
        '<svg viewBox="0 0 1000 640" role="img" aria-label="Map of profiles"></svg>\n<div id="legend"></div>\n'
        f"</main>\n<script>const facts = {data};{_SCRIPT}</script>\n</body>\n</html>\n"
    )


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #586374; --line: #d9dfe7; --page: #f5f7fa; --card: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8edf4; --soft: #9aa7b8; --line: #2c3644; --page: #10151c; --card: #182029; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; } p { color: var(--soft); margin: 0 0 .8rem; }
input { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: .4rem;
  padding: .3rem .5rem; max-width: 100%; }
output { color: var(--ink); margin-left: .6rem; }
svg { width: 100%; height: auto; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
circle { fill-opacity: .75; cursor: pointer; } circle.chosen { stroke: var(--ink); stroke-width: 3; fill-opacity: 1; }
text { font: 600 16px system-ui, sans-serif; fill: var(--ink); paint-order: stroke; stroke: var(--card);
  stroke-width: 5px; }
#legend { margin-top: .6rem; display: flex; flex-wrap: wrap; gap: .3rem 1rem; align-items: center; color: var(--soft); }
#legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: 50%; margin-right: .35rem; }
#legend .scale { width: 12rem; height: .7rem; border-radius: .35rem; margin: 0; }
"""

_SCRIPT = """
const make = (tag, parent) => parent.appendChild(document.createElementNS("http://www.w3.org/2000/svg", tag));
const [svg, said, find, legend] = ["svg", "#said", "#find", "#legend"].map(each => document.querySelector(each));
const has = facts.points.filter(p => p[3] !== null && p[3] !== "");
const numeric = has.length > 0 && has.every(p => !isNaN(p[3]));
const palette = ["#1f77b4", "#d95f02", "#2a9d57", "#c0392b", "#7b52ab", "#8c564b", "#d45fa5", "#7f8c1d", "#17a2b8"];
const low = Math.min(...has.map(p => +p[3])), high = Math.max(...has.map(p => +p[3]));
const counts = {};
for (const p of has) counts[p[3]] = (counts[p[3]] || 0) + 1;
const groups = Object.keys(counts).sort((a, b) => counts[b] - counts[a]).slice(0, palette.length);
const ramp = share => `hsl(${250 - 200 * share} 65% ${38 + 16 * share}%)`;
function color(value) {
  if (!has.length) return palette[0];
  if (value === null || value === "") return "#9aa4b1";
  if (numeric) return ramp(high > low ? (value - low) / (high - low) : .5);
  const place = groups.indexOf(value);
  return place < 0 ? "#5b6470" : palette[place];
}
const entry = (fill, text) => {
  const item = legend.appendChild(document.createElement("span")), dot = item.appendChild(document.createElement("i"));
  dot.style.background = fill; item.append(text);
};
if (has.length) legend.append(facts.column);
if (numeric) {
  const text = value => legend.appendChild(document.createElement("span")).textContent = value;
  text(low);
  const bar = legend.appendChild(document.createElement("span"));
  bar.className = "scale";
  bar.style.background = `linear-gradient(to right, ${[0, .25, .5, .75, 1].map(ramp)})`;
  text(high);
} else for (const name of groups) entry(color(name), name);
if (has.length && has.length < facts.points.length) entry("#9aa4b1", "no value");
const ends = axis => [Math.min(...facts.points.map(p => p[axis])), Math.max(...facts.points.map(p => p[axis]))];
const scale = (value, [a, b], from, to) => from + (to - from) * (b > a ? (value - a) / (b - a) : .5);
const xs = ends(1), ys = ends(2), circles = {};
for (const [name, x, y, value] of facts.points) {
  const circle = make("circle", svg);
  circle.setAttribute("cx", scale(x, xs, 30, 970)); circle.setAttribute("cy", scale(y, ys, 610, 30));
  circle.setAttribute("r", 7); circle.setAttribute("fill", color(value));
  make("title", circle).textContent = name;
  const tell = () => { said.textContent = value === null ? name : `${name}: ${facts.column} ${value}`; };
  circle.addEventListener("pointerenter", tell);
  circle.addEventListener("click", () => { tell(); mark([name]); });
  circles[name] = circle;
  document.querySelector("#names").appendChild(document.createElement("option")).value = name;
}
function mark(names) {
  svg.querySelectorAll("text").forEach(label => label.remove());
  svg.querySelectorAll(".chosen").forEach(circle => circle.classList.remove("chosen"));
  for (const name of names) {
    const circle = circles[name], label = make("text", svg), x = +circle.getAttribute("cx");
    circle.classList.add("chosen"); svg.append(circle); svg.append(label);
    label.textContent = name; label.setAttribute("x", x + (x > 780 ? -13 : 13));
    label.setAttribute("y", +circle.getAttribute("cy") + 5);
    label.setAttribute("text-anchor", x > 780 ? "end" : "start");
  }
}
find.addEventListener("input", () => {
  const wanted = find.value.toLowerCase();
  mark(wanted ? Object.keys(circles).filter(name => name.toLowerCase().includes(wanted)).slice(0, 20) : facts.marked);
});
mark(facts.marked);
"""
