"""Names beside the points of a plot, placed so that they cover neither each other nor the points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in pixels."""

_RADII = (7, 13, 20, 29, 40, 54, 70)  # points from a point to its label
_ANGLES = tuple(math.radians(angle) for angle in (90, -90, 0, 180, 45, 135, -45, -135))
_NEAR = 20  # points from a point to a label that is not needed, at most
_WIDTH = 0.58  # of a letter, in font sizes
_POINT = 4.0  # reach of a point's mark, in points


def place_labels(
    figure: Any, axes: Any, points: Sequence[Any], labels: Sequence[str], *, needed: int | None = None, size: float = 8
) -> int:
    """Write a label beside each point, with a line to it where it is far.

    Args:
        figure: a ``matplotlib`` figure whose axes have their final limits.
        axes: with the points.
        points: places ``[n, 2]`` of all points that no label may cover, in data coordinates.
        labels: of the first points, the most important first.
        needed: how many labels are written even if they have to cover something; None: all. Others are left out where
            there is no room near their point.
        size: of the font, in points.

    Returns:
        how many labels were written.
    """
    figure.draw_without_rendering()
    unit = figure.dpi / 72
    frame = axes.get_window_extent()
    places = [tuple(map(float, axes.transData.transform(point))) for point in points]
    taken: list[Box] = [(x - _POINT * unit, y - _POINT * unit, x + _POINT * unit, y + _POINT * unit) for x, y in places]
    written = 0
    for number, label in enumerate(labels):
        wide, high = _WIDTH * size * len(label) * unit, 1.3 * size * unit
        found = min(
            (
                (_covered(box, taken) + _outside(box, frame), radius, turn, box)
                for radius in _RADII
                for turn, angle in enumerate(_ANGLES)
                for box in (_box(places[number], radius * unit, angle, wide, high),)
            ),
            key=lambda each: each[:3],
        )
        if needed is not None and number >= needed and (found[0] > 0 or found[1] > _NEAR):
            continue
        box = found[3]
        taken.append(box)
        x, y = places[number]
        middle = ((box[0] + box[2]) / 2 - x) / unit, ((box[1] + box[3]) / 2 - y) / unit
        line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
        text = axes.annotate(
            label, points[number], xytext=middle, textcoords="offset points", ha="center", va="center", fontsize=size,
            parse_math=False, arrowprops=line if found[1] > _RADII[1] else None,
        )  # fmt: skip
        text.set_in_layout(False)
        written += 1
    return written


def _box(place: tuple[float, ...], radius: float, angle: float, wide: float, high: float) -> Box:
    """Where a label is whose nearest edge is ``radius`` from a point."""
    x = place[0] + math.cos(angle) * (radius + wide / 2)
    y = place[1] + math.sin(angle) * (radius + high / 2)
    return x - wide / 2, y - high / 2, x + wide / 2, y + high / 2


def _covered(box: Box, taken: Sequence[Box]) -> float:
    """Area that a box shares with others."""
    return sum(
        max(0.0, min(box[2], other[2]) - max(box[0], other[0]))
        * max(0.0, min(box[3], other[3]) - max(box[1], other[1]))
        for other in taken
    )


def _outside(box: Box, frame: Any) -> float:
    """Area by which a box leaves the axes, roughly."""
    sideways = max(0.0, frame.x0 - box[0]) + max(0.0, box[2] - frame.x1)
    upwards = max(0.0, frame.y0 - box[1]) + max(0.0, box[3] - frame.y1)
    return float(sideways * (box[3] - box[1]) + upwards * (box[2] - box[0]))
