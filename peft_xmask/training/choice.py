"""Which layers each profile keeps once training is over: what all share, its offset, its mask."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.packing import pack_halves, unpack_halves
from .best_rows import BestRows
from .evaluation import Evaluator
from .profile_model import Packed, ProfileModel
from .trained_bank import Metrics

STRENGTHS = (0.0, 0.1, 0.25, 0.5, 1.0)
"""Candidates for the strength of a mask, by which gains are multiplied."""

GROUP = 20
"""Profiles whose validation examples decide together, at least."""

_GROUPS = 5
_ENOUGH = 10  # validation examples, from which a profile's own losses count


@dataclass
class Choice:
    """The rows that are kept, and how each profile did.

    Attributes:
        packed: masks and gains.
        metrics: by profile.
        offset_bits: uint8 ``[U, 2 * C]``, or None.
    """

    packed: Packed
    metrics: Metrics = field(default_factory=dict)
    offset_bits: Tensor | None = None


def choose_layers(
    profiles: ProfileModel,
    best: BestRows,
    evaluator: Evaluator | None,
    counts: Tensor,
    offset_bits: Tensor | None,
    *,
    head_moved: bool,
) -> Choice:
    """Decide what each profile keeps of its layers.

    Of masks a profile keeps its best row by validation, or its last one if it has no validation examples.

    The strength of masks depends on how many examples a profile has: profiles of similar counts, at least
    :data:`GROUP` of them, decide together. They take the strength with the smallest mean change of the validation loss
    plus one standard error, compared to the layer below; strength 0 drops the mask. A profile with validation examples
    of its own (at least ten, if there is a group to decide otherwise) then drops each layer that makes it no better
    than the layer below.

    Args:
        profiles: with the last rows.
        best: the best rows of earlier evaluations.
        evaluator: None without validation examples: every layer is kept.
        counts: training examples of each profile, long ``[U]``.
        offset_bits: uint8 ``[U, 2 * C]``, which the model adds at present; None without offsets.
        head_moved: whether the head was trained with the rows, so that rows must be compared under the last head.
    """
    last, offset = profiles.packed(), offset_bits is not None
    strength, has_offset = torch.ones(len(counts)), torch.full((len(counts),), offset)
    if evaluator is None:
        none = torch.full((len(counts),), torch.nan, dtype=torch.float64)
        held_out, steps = torch.zeros_like(counts), torch.full_like(counts, -1)
        metrics = _metrics(profiles, best, counts, none, none, held_out, steps, strength, has_offset)
        return Choice(last, metrics, offset_bits)

    chosen = best.loss.isfinite()
    if head_moved:
        of_last = evaluator.losses(profiles.model)
        profiles.load(_merged(chosen, (best.bits, best.gain_bits), last))
        chosen = chosen & (evaluator.losses(profiles.model) <= of_last)
    bits, gain_bits = _merged(chosen, (best.bits, best.gain_bits), last)
    profiles.load((bits, gain_bits))
    shared = evaluator.losses(profiles.model, shared=True)
    if gain_bits is None:
        losses = evaluator.losses(profiles.model)
    else:
        gains = unpack_halves(gain_bits)
        # a gain of 0 leaves what all share, and the offset
        below = _losses_at(0.0, profiles, evaluator, bits, gains) if offset else shared
        by_strength = [below, *(_losses_at(each, profiles, evaluator, bits, gains) for each in STRENGTHS[1:])]
        strength, losses = _strengths(torch.stack(by_strength), counts, evaluator.counts)
        own = _decides(evaluator.counts)
        strength[own & ~(losses < torch.minimum(below, shared))] = 0
        has_offset = has_offset & ((strength > 0) | ~own | (below < shared))
        losses = torch.where(strength > 0, losses, torch.where(has_offset, below, shared))
        gain_bits = pack_halves(gains * strength.view(-1, 1, 1))
        if offset_bits is not None:
            offset_bits = torch.where(has_offset.unsqueeze(1), offset_bits, 0)
    steps = torch.where(chosen, best.step, -1)
    metrics = _metrics(profiles, best, counts, losses, shared, evaluator.counts, steps, strength, has_offset)
    return Choice((bits, gain_bits), metrics, offset_bits)


def _losses_at(strength: float, profiles: ProfileModel, evaluator: Evaluator, bits: Tensor, gains: Tensor) -> Tensor:
    """Validation losses, float64 ``[U]``, of masks whose gains ``[U, S, 1]`` are multiplied."""
    profiles.load((bits, pack_halves(gains * strength)))
    return evaluator.losses(profiles.model)


def _strengths(losses: Tensor, counts: Tensor, held_out: Tensor) -> tuple[Tensor, Tensor]:
    """The strength of each profile's mask, and its loss then.

    Shapes: ``losses [strengths, U]`` -> ``[U]``, ``[U]``.
    """
    strength = torch.ones(len(counts))
    judged = (held_out > 0).nonzero().view(-1)
    if len(judged) >= GROUP:
        order = judged[torch.argsort(counts[judged], stable=True)]
        parts = torch.tensor_split(order, min(_GROUPS, len(judged) // GROUP))
        limits = torch.stack([counts[part].max() for part in parts]).unique()  # equal counts are in one group
        group_of = torch.searchsorted(limits, counts).clamp_max(len(limits) - 1)
        for number in range(len(limits)):
            group = judged[group_of[judged] == number]
            change = (losses[:, group] - losses[0, group]).nan_to_num(torch.inf, torch.inf)
            score = change.mean(1) + change.std(1).nan_to_num(torch.inf) / len(group) ** 0.5
            strength[group_of == number] = STRENGTHS[int(score.argmin())]
    place = torch.searchsorted(torch.tensor(STRENGTHS), strength)
    return strength, losses.gather(0, place.unsqueeze(0))[0]


def _decides(held_out: Tensor) -> Tensor:
    """Which profiles have validation examples enough to decide for themselves, bool ``[U]``."""
    grouped = int((held_out > 0).sum()) >= GROUP
    return held_out >= (_ENOUGH if grouped else 1)


def _merged(chosen: Tensor, best: Packed, last: Packed) -> Packed:
    bits = torch.where(chosen.view(-1, 1, 1, 1), best[0], last[0])
    if last[1] is None or best[1] is None:
        return bits, last[1]
    return bits, torch.where(chosen.view(-1, 1, 1), best[1], last[1])


def _metrics(
    profiles: ProfileModel,
    best: BestRows,
    counts: Tensor,
    losses: Tensor,
    shared: Tensor,
    held_out: Tensor,
    steps: Tensor,
    strength: Tensor,
    has_offset: Tensor,
) -> Metrics:
    def number(values: Tensor, row: int) -> float | None:
        return float(values[row]) if values[row].isfinite() else None

    def one(row: int) -> dict[str, Any]:
        kept = {"offset": bool(has_offset[row]), "mask": bool(strength[row] > 0)}
        return {
            "examples": int(counts[row]),
            "validation_examples": int(held_out[row]),
            "validation_loss": number(losses, row),
            "shared_loss": number(shared, row),
            "layers": [layer for layer, there in kept.items() if there],
            "mask_strength": float(strength[row]),
            "best_step": int(steps[row]) if steps[row] >= 0 else None,
            "stopped_step": int(best.stopped_at[row]) if best.stopped[row] else None,
        }

    return {name: one(row) for row, name in enumerate(profiles.index)}
