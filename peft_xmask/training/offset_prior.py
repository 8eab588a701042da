"""How far people's offsets lie apart: the variance of their prior."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .offsets import SharedOutputs, fit_offsets, profiles_at_once

VARIANCES = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Candidates for the prior variance: of logits; of values, in units of the variance of a person's residuals."""

_MOST = 2000  # people who decide


def likeliest_variance(shared: SharedOutputs, rows: Tensor, candidates: Sequence[float] = VARIANCES) -> float:
    """The variance v under which the labels are most likely when nobody's offset is known.

    - Values with residuals of mean ``r_u`` over n_u examples: ``r_u ~ N(0, s^2 (v + 1 / n_u))``, where ``s^2`` is the
      variance of a person's residuals.
    - Classes, and labels of which a text may have several, by Laplace's approximation: ``sum_u loss(o_u) +
      |o_u|^2 / (2 v) + log det(I + v H_u) / 2`` is smallest, where ``o_u`` is the most likely offset and ``H_u`` the
      Hessian of the loss there.

    The loss on a person's held-out examples would be a worse guide: with many examples a person, nearly any variance
    does there, but a person with five examples needs the right one.

    Args:
        shared: outputs on training examples, without offsets.
        rows: long ``[n]``, the person of each.
        candidates: variances; 0 is no offsets.

    Source: evidence maximisation (MacKay 1992), with Laplace's approximation.
    """
    people, rows = torch.unique(rows, return_inverse=True)
    most = min(_MOST, profiles_at_once(shared.outputs.shape[1]))
    if len(people) > most:
        chosen = torch.isin(rows, torch.linspace(0, len(people) - 1, most).long())
        shared = shared[chosen]
        people, rows = torch.unique(rows[chosen], return_inverse=True)
    count = len(people)
    if shared.kind == "values":
        return _of_values(shared.residuals.double(), rows, count, candidates)

    def minus_log_evidence(variance: float) -> float:
        if variance == 0:
            return float(shared.losses().sum())
        offsets = fit_offsets(shared, rows, count, variance)
        moved = shared.moved(offsets[rows])
        fitted = moved.losses().sum() + (offsets**2).sum() / (2 * variance)
        spread = torch.eye(offsets.shape[1]) + variance * moved.curvatures(rows, count)
        return float(fitted + torch.logdet(spread).sum() / 2)

    return min(candidates, key=minus_log_evidence)


def _of_values(residuals: Tensor, rows: Tensor, count: int, candidates: Sequence[float]) -> float:
    counts = torch.bincount(rows, minlength=count).double()
    means = torch.zeros(count, dtype=torch.double).index_add_(0, rows, residuals) / counts
    noise = (residuals - means[rows]).pow(2).sum() / max(1, len(rows) - count)

    def misfit(variance: float) -> float:
        spread = noise.clamp_min(1e-12) * (variance + 1 / counts)
        return float((spread.log() + means**2 / spread).sum())

    return min(candidates, key=misfit)
