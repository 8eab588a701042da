"""Which row each profile keeps once training is over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .best_rows import BestRows
from .evaluation import Evaluator
from .profile_model import Packed, ProfileModel
from .trained_bank import Metrics


def choose_rows(
    profiles: ProfileModel, best: BestRows, evaluator: Evaluator | None, counts: Tensor, *, head_moved: bool
) -> tuple[Packed, Metrics]:
    """The rows that are kept, and how each profile did.

    A profile keeps its best row by validation, or its last one if it has no validation examples. Where even the best
    row is no better than the model without it, the profile's gains become zero, if gains are learnt: it is served by
    what all profiles share.

    Args:
        profiles: with the last rows.
        best: the best ones of earlier evaluations.
        evaluator: None without validation examples.
        counts: training examples of each profile, long ``[U]``.
        head_moved: whether the head was trained with the rows, so that they must be compared under the last head.
    """
    last = profiles.packed()
    if evaluator is None:
        nothing = torch.full((len(counts),), torch.nan, dtype=torch.float64)
        return last, _metrics(profiles, best, counts, torch.zeros_like(counts), nothing, nothing, None)
    chosen, losses = best.loss.isfinite(), best.loss.clone()
    if head_moved:
        of_last = evaluator.losses(profiles.model)
        profiles.load(_merged(chosen, (best.bits, best.gain_bits), last))
        losses = evaluator.losses(profiles.model)
        chosen = chosen & (losses <= of_last)
        losses = torch.where(chosen, losses, of_last)
    bits, gain_bits = _merged(chosen, (best.bits, best.gain_bits), last)
    shared = evaluator.losses(profiles.model, shared=True)
    dropped = None
    if gain_bits is not None:
        dropped = (shared <= losses) | (losses.isinf() & shared.isfinite())
        gain_bits[dropped] = 0
        losses = torch.where(dropped, shared, losses)
    step = torch.where(chosen, best.step, -1)
    return (bits, gain_bits), _metrics(profiles, best, counts, evaluator.counts, losses, shared, dropped, step)


def _merged(chosen: Tensor, best: Packed, last: Packed) -> Packed:
    bits = torch.where(chosen.view(-1, 1, 1, 1), best[0], last[0])
    if last[1] is None or best[1] is None:
        return bits, last[1]
    return bits, torch.where(chosen.view(-1, 1, 1), best[1], last[1])


def _metrics(
    profiles: ProfileModel,
    best: BestRows,
    counts: Tensor,
    held_out: Tensor,
    losses: Tensor,
    shared: Tensor,
    dropped: Tensor | None,
    step: Tensor | None = None,
) -> Metrics:
    def number(values: Tensor, row: int) -> float | None:
        return float(values[row]) if values[row].isfinite() else None

    def one(row: int) -> dict[str, Any]:
        return {
            "examples": int(counts[row]),
            "validation_examples": int(held_out[row]),
            "validation_loss": number(losses, row),
            "shared_loss": number(shared, row),
            "layers": [] if dropped is not None and dropped[row] else ["mask"],
            "best_step": None if step is None or step[row] < 0 else int(step[row]),
            "stopped_step": int(best.stopped_at[row]) if best.stopped[row] else None,
        }

    return {name: one(row) for row, name in enumerate(profiles.index)}
