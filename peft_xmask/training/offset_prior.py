"""How far people's offsets lie apart: the variance of their prior."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

VARIANCES = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Candidates for the prior variance: of logits; of values, in units of the variance of a person's residuals."""

Fit = Callable[[Tensor, Tensor, Tensor, int, float], Tensor]
"""Called with outputs, labels, rows, the number of people and a variance; gives their offsets ``[U, C]``."""

_MOST = 2000  # people who decide
_NUMBERS = 50_000_000  # in the curvatures of these people
_EXAMPLES = 4096  # whose curvatures are computed at once


def likeliest_variance(
    kind: str, outputs: Tensor, labels: Tensor, rows: Tensor, fit: Fit, candidates: Sequence[float] = VARIANCES
) -> float:
    """The variance v under which the labels are most likely when nobody's offset is known.

    - Values with residuals of mean ``r_u`` over n_u examples: ``r_u ~ N(0, s^2 (v + 1 / n_u))``, where ``s^2`` is the
      variance of a person's residuals.
    - Classes, and labels of which a text may have several, by Laplace's approximation: ``sum_u loss(o_u) +
      |o_u|^2 / (2 v) + log det(I + v H_u) / 2`` is smallest, where ``o_u`` is the most likely offset and ``H_u`` the
      Hessian of the loss there.

    The loss on a person's held-out examples would be a worse guide: with many examples a person, nearly any variance
    does there, but a person with five examples needs the right one.

    Args:
        kind: ``"values"``, ``"classes"`` or ``"labels"``.
        outputs: ``[n, C]``, without offsets.
        labels: ``[n]`` values or classes, or ``[n, C]``.
        rows: long ``[n]``, the person of each example.
        fit: computes offsets.
        candidates: variances; 0 is no offsets.

    Source: evidence maximisation (MacKay 1992), with Laplace's approximation.
    """
    people, rows = torch.unique(rows, return_inverse=True)
    most = max(1, min(_MOST, _NUMBERS // outputs.shape[1] ** 2))
    if len(people) > most:
        chosen = torch.isin(rows, torch.linspace(0, len(people) - 1, most).long())
        outputs, labels = outputs[chosen], labels[chosen]
        people, rows = torch.unique(rows[chosen], return_inverse=True)
    count = len(people)
    if kind == "values":
        return _of_values(labels.double() - outputs.view(-1).double(), rows, count, candidates)

    def minus_log_evidence(variance: float) -> float:
        if variance == 0:
            return float(_loss(kind, outputs, labels))
        offsets = fit(outputs, labels, rows, count, variance)
        moved = outputs + offsets[rows]
        fitted = _loss(kind, moved, labels) + (offsets**2).sum() / (2 * variance)
        return float(fitted + _log_determinants(kind, moved, rows, count, variance) / 2)

    return min(candidates, key=minus_log_evidence)


def _of_values(residuals: Tensor, rows: Tensor, count: int, candidates: Sequence[float]) -> float:
    counts = torch.bincount(rows, minlength=count).double()
    means = torch.zeros(count, dtype=torch.double).index_add_(0, rows, residuals) / counts
    noise = (residuals - means[rows]).pow(2).sum() / max(1, len(rows) - count)

    def misfit(variance: float) -> float:
        spread = noise.clamp_min(1e-12) * (variance + 1 / counts)
        return float((spread.log() + means**2 / spread).sum())

    return min(candidates, key=misfit)


def _loss(kind: str, outputs: Tensor, labels: Tensor) -> Tensor:
    """In nats, of all examples together."""
    if kind == "classes":
        return F.cross_entropy(outputs, labels, reduction="sum")
    return F.binary_cross_entropy_with_logits(outputs, labels, reduction="sum")


def _log_determinants(kind: str, outputs: Tensor, rows: Tensor, count: int, variance: float) -> Tensor:
    """``sum_u log det(I + v H_u)``."""
    classes = outputs.shape[1]
    if kind == "labels":
        likely = outputs.sigmoid()
        curvature = torch.zeros(count, classes).index_add_(0, rows, likely * (1 - likely))
        return torch.log1p(variance * curvature).sum()
    curvature = torch.zeros(count, classes, classes)
    for some, mine in zip(outputs.split(_EXAMPLES), rows.split(_EXAMPLES), strict=True):
        likely = some.softmax(1)
        curvature.index_add_(0, mine, torch.diag_embed(likely) - likely.unsqueeze(2) * likely.unsqueeze(1))
    return torch.logdet(torch.eye(classes) + variance * curvature).sum()
