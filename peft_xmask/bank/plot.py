"""Plots of a bank: masks, a map of profiles, use of adapters, bytes per profile. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..core.labels import place_labels
from ..core.packing import unpack_halves
from ..errors import ConfigError, MissingExtraError
from ..tuners.xpeft.spec import MaskSpec
from .bank import ProfileBank

SIDES = ("down-projections", "up-projections")
_CATEGORIES = 9
_SEED = 0
_NAMED = 24  # points of a map that are named without being asked for


def plot_masks(bank: ProfileBank, names: Sequence[str] = ()) -> Any:
    """Heat maps of masks with one row of pixels per site: one map for down-projections, one for up-projections.

    Args:
        names: profiles to draw, each on its own; none: the mean over all profiles.

    Returns:
        a ``matplotlib`` figure.

    Raises:
        KeyError: no such profile.
        MissingExtraError: matplotlib is not installed.
    """
    rows = {name: weights(bank.spec, bank[name].bits.unsqueeze(0))[0] for name in names}
    if not names:
        rows = {f"mean of {len(bank):,} profiles": mean_weights(bank)}
    sites, count = bank.spec.num_sites, bank.spec.num_adapters
    figure = _figure(10, 1.6 + len(rows) * max(1.3, 0.2 * sites))
    axes = figure.subplots(len(rows), 2, squeeze=False, sharex=True, sharey=True)
    drawn = np.stack(list(rows.values()))
    binary = bank.spec.mask_type == "hard" and bool(names)
    low, high = (0.0, 1.0) if binary else (float(drawn.min()), float(drawn.max()))
    colors = "Greys" if binary else "viridis"
    for row, (name, both) in zip(axes, rows.items(), strict=True):
        for place, side, each in zip(row, SIDES, both, strict=True):
            image = place.imshow(
                each, aspect="auto", interpolation="nearest", cmap=colors, vmin=low, vmax=max(high, low + 1e-6),
                extent=(-0.5, count - 0.5, sites - 0.5, -0.5),
            )  # fmt: skip
            place.set_title(f"{name}: {side}", fontsize=9, parse_math=False)
            place.yaxis.get_major_locator().set_params(integer=True)
        row[0].set_ylabel("site")
    for place in axes[-1]:
        place.set_xlabel("adapter of the pool")
    if not binary:
        label = "share of profiles that choose it" if bank.spec.mask_type == "hard" else "weight"
        figure.colorbar(image, ax=axes.ravel().tolist(), label=label, location="bottom", shrink=0.5, aspect=40)
    return figure


def plot_usage(bank: ProfileBank) -> Any:
    """Histogram over sites and adapters of the share of profiles that select an adapter, or of its mean weight.

    It also shows what chance would give: shares around k / N, with the spread of independent choices.

    Returns:
        a ``matplotlib`` figure.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    hard, spec = bank.spec.mask_type == "hard", bank.spec
    figure = _figure(8, 4.5)
    axes = figure.add_subplot()
    shares = mean_weights(bank)
    edges = _whole_bins(shares, len(bank)) if hard else np.histogram_bin_edges(shares, bins=40)
    for side, each, color in zip(SIDES, shares, ("tab:blue", "tab:orange"), strict=True):
        axes.hist(each.ravel(), bins=edges, histtype="stepfilled", alpha=0.5, color=color, label=side)
    chance = spec.top_k / spec.num_adapters if hard else 1 / spec.num_adapters
    axes.axvline(chance, color="black", linestyle=":", label=f"chance: {chance:.3g}")
    if hard and len(bank):
        spread = 2 * (chance * (1 - chance) / len(bank)) ** 0.5
        axes.axvspan(
            chance - spread, chance + spread, color="black", alpha=0.12, label="2 standard deviations of chance"
        )
    axes.set_xlabel(
        "share of profiles that choose an adapter at a site" if hard else "mean weight of an adapter at a site"
    )
    axes.set_ylabel("pairs of site and adapter")
    axes.set_title(f"Use of the pool by {len(bank):,} profiles ({spec.num_sites} sites, {spec.num_adapters} adapters)")
    axes.legend(fontsize=8)
    return figure


def plot_map(
    bank: ProfileBank,
    values: Mapping[str, str] | None = None,
    *,
    column: str = "",
    limit: int = 2000,
    names: Sequence[str] = (),
) -> Any:
    """A map of profiles in two dimensions, where profiles with similar masks are close.

    These are the first two principal components of the masks, which is classical scaling of their Hamming distances.

    Args:
        values: a value per profile name, shown as colour; profiles without one are grey.
        column: name of the values.
        limit: maximum number of profiles drawn, chosen at random with a fixed seed.
        names: profiles that are drawn in any case, and named. Others are named, outermost first, where there is room.

    Returns:
        a ``matplotlib`` figure.

    Raises:
        ConfigError: fewer than three profiles.
        KeyError: no such profile.
        MissingExtraError: matplotlib is not installed.
    """
    if min(len(bank), limit) < 3:
        raise ConfigError(f"Expected at least three profiles to draw a map of, found {min(len(bank), limit)}.")
    figure = _figure(8, 6)
    axes = figure.add_subplot()
    drawn, points, explained = coordinates(bank, limit, names)
    if values is None:
        axes.scatter(*points.T, s=14, alpha=0.7, linewidths=0)
    else:
        _color(figure, axes, points, [values.get(name) for name in drawn], column)
    wanted = [place for place, name in enumerate(drawn) if name in set(names)]
    if wanted:
        axes.scatter(*points[wanted].T, s=46, facecolors="none", edgecolors="black", linewidths=1)
    outermost = np.argsort(-np.hypot(*(points - points.mean(0)).T / points.std(0).clip(1e-12)[:, None]))
    order = [*wanted, *(int(place) for place in outermost if place not in set(wanted))]
    named = len(order) if len(order) <= _NAMED else len(wanted) + _NAMED
    axes.margins(0.08)
    axes.set_xlabel(f"first component ({explained[0]:.1%} of the variance)")
    axes.set_ylabel(f"second component ({explained[1]:.1%})")
    some = f"{len(drawn):,} profiles" + (f", chosen at random of {len(bank):,}" if len(drawn) < len(bank) else "")
    axes.set_title(f"Profiles by the likeness of their masks: {some}")
    place_labels(
        figure, axes, list(points[order]), [drawn[place] for place in order[:named]], needed=len(wanted), size=7
    )
    return figure


def plot_bytes(sizes: Mapping[str, float], highlighted: Sequence[str] = ()) -> Any:
    """Bar chart of bytes per profile, smallest first, on a logarithmic axis.

    Args:
        sizes: in bytes, by name.
        highlighted: names whose bars have another colour.

    Returns:
        a ``matplotlib`` figure.

    Raises:
        ConfigError: nothing to draw.
        MissingExtraError: matplotlib is not installed.
    """
    if not sizes or min(sizes.values()) <= 0:
        raise ConfigError(f"Expected bytes above zero for at least one name, found {dict(sizes)}.")
    ordered = dict(sorted(sizes.items(), key=lambda item: -item[1]))
    figure = _figure(8, 1.2 + 0.4 * len(ordered))
    axes = figure.add_subplot()
    colors = ["tab:blue" if name in highlighted else "tab:gray" for name in ordered]
    axes.barh(list(ordered), list(ordered.values()), color=colors)
    smallest = min(sizes.values())
    for place, size in enumerate(ordered.values()):
        times = "" if size == smallest else f"  ({size / smallest:,.{0 if size >= 10 * smallest else 2}f} x)"
        axes.annotate(
            f"{size:,.0f} B{times}", (size, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_xscale("log")
    axes.set_xlim(smallest / 3, max(sizes.values()) * 30)
    axes.set_xlabel("bytes of a profile as it is saved, without heads and pools")
    return figure


def weights(spec: MaskSpec, bits: Tensor) -> NDArray[np.float32]:
    """Masks as numbers: 1 where an adapter is chosen, or softmax weights. ``[P, 2, S, W]`` -> ``[P, 2, S, N]``."""
    if spec.mask_type == "hard":
        return np.unpackbits(bits.numpy(), axis=-1, count=spec.num_adapters, bitorder="little").astype(np.float32)
    found: NDArray[np.float32] = unpack_halves(bits).softmax(-1).numpy()
    return found


def mean_weights(bank: ProfileBank) -> NDArray[np.float64]:
    """Mean of :func:`weights` over all profiles, ``[2, S, N]``."""
    total = np.zeros((2, bank.spec.num_sites, bank.spec.num_adapters))
    for block in bank.blocks():
        for start in range(0, len(block), 4096):
            total += weights(bank.spec, block[start : start + 4096]).sum(0, dtype=np.float64)
    return total / max(1, len(bank))


def coordinates(
    bank: ProfileBank, limit: int, wanted: Sequence[str] = ()
) -> tuple[list[str], NDArray[np.float64], NDArray[np.float64]]:
    """Names, places ``[P, 2]`` and the shares of the variance that the two dimensions explain, ``[2]``.

    Args:
        limit: most profiles, chosen at random.
        wanted: profiles that are among them in any case.

    Raises:
        KeyError: no such profile.
    """
    for name in wanted:
        bank[name]
    places = np.arange(len(bank))
    if len(bank) > limit:
        places = np.sort(np.random.default_rng(_SEED).choice(len(bank), limit, replace=False))
    names = [bank.name_at(place) for place in places.tolist()]
    names += [name for name in wanted if name not in set(names)]
    masks = np.concatenate([weights(bank.spec, bank[name].bits.unsqueeze(0)).reshape(1, -1) for name in names])
    centred = masks.astype(np.float64) - masks.mean(0, dtype=np.float64)
    values, vectors = np.linalg.eigh(centred @ centred.T)
    top, found = values[::-1][:2].clip(min=0), vectors[:, ::-1][:, :2]
    found = found * np.sign(found[np.abs(found).argmax(0), [0, 1]])
    return names, found * np.sqrt(top), top / max(float(values.sum()), 1e-12)


def _color(figure: Any, axes: Any, points: NDArray[Any], values: Sequence[str | None], column: str) -> None:
    """Numbers as a colour bar; words as colours with a legend, the rarer ones together."""
    missing = np.array([value is None or value == "" for value in values])
    axes.scatter(*points[missing].T, s=10, color="lightgray", linewidths=0, label="no value" if missing.any() else None)
    known, said = points[~missing], [value for value, gone in zip(values, missing, strict=True) if value and not gone]
    try:
        numbers = [float(value) for value in said]
    except ValueError:
        counts = {value: said.count(value) for value in dict.fromkeys(said)}
        frequent = sorted(counts, key=lambda value: (-counts[value], value))[:_CATEGORIES]
        for number, value in enumerate(frequent):
            chosen = known[np.array([each == value for each in said])]
            axes.scatter(*chosen.T, s=14, alpha=0.8, linewidths=0, color=f"C{number}", label=value)
        rest = known[np.array([each not in frequent for each in said], dtype=bool)]
        if len(rest):
            axes.scatter(
                *rest.T, s=10, color="black", alpha=0.3, linewidths=0, label=f"{len(counts) - _CATEGORIES} others"
            )
        axes.legend(title=column or None, fontsize=8)
        return
    figure.colorbar(axes.scatter(*known.T, s=14, c=numbers, cmap="viridis", linewidths=0), ax=axes, label=column)


def _whole_bins(shares: NDArray[Any], count: int) -> NDArray[np.float64]:
    """Bin edges between the possible shares, j / P, with equally many of these in each bin: no comb."""
    low, high = round(float(shares.min()) * count), round(float(shares.max()) * count)
    step = max(1, math.ceil((high - low + 1) / 40))
    edges: NDArray[np.float64] = (np.arange(low, high + step + 1, step) - 0.5) / max(1, count)
    return edges


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            'Drawing needs matplotlib, which is not installed: pip install "peft_xmask[plot]"'
        ) from error
    return Figure(figsize=(width, height), layout="constrained")
