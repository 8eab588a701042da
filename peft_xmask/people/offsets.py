"""Offsets: numbers added to the model's outputs for one person, one for each label. A few bytes, computed at once.

An offset is the most likely one under a normal prior around zero: ``argmin_o sum_i loss(z_i + o, y_i) + |o|^2 / (2 v)``
over the person's examples i with logits z_i. So people with few examples stay close to the common part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..bank.bank import ProfileBank

VARIANCES = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Candidates for the prior variance: of log-odds; for regression in units of the residuals' variance."""


def losses(task: str, logits: Tensor, targets: Tensor) -> Tensor:
    """Loss of each example ``[n]``: cross-entropy in nats, or the squared error.

    Args:
        task: see :data:`~peft_xmask.people.table.TASKS`.
        logits: ``[n, C]``.
        targets: long ``[n]``, float ``[n]`` for regression, float ``[n, C]`` for multi-label.
    """
    if task == "regression":
        squared: Tensor = (logits.view(-1) - targets) ** 2
        return squared
    if task == "multi-label":
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)
    return F.cross_entropy(logits, targets, reduction="none")


def fit_offsets(task: str, logits: Tensor, targets: Tensor, rows: Tensor, count: int, variance: float) -> Tensor:
    """The offset of each person, ``[count, C]``; zero for people without examples.

    Args:
        task: see :func:`losses`.
        logits: ``[n, C]``, without offsets.
        targets: see :func:`losses`.
        rows: long ``[n]``, the number of each example's person.
        count: of people.
        variance: of the prior; 0: no offsets.
    """
    offsets = torch.zeros(count, logits.shape[1])
    if not len(logits) or variance <= 0:
        return offsets
    if task == "regression":
        residuals = (targets - logits.view(-1)).float()
        sums = torch.zeros(count).index_add_(0, rows, residuals)
        found: Tensor = (sums / (torch.bincount(rows, minlength=count) + 1 / variance)).unsqueeze(1)
        return found
    offsets.requires_grad_(True)
    optimizer = torch.optim.LBFGS([offsets], max_iter=100, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        total = losses(task, logits + offsets[rows], targets).sum() + (offsets**2).sum() / (2 * variance)
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(objective)  # type: ignore[no-untyped-call]
    return offsets.detach()


def choose_variance(
    task: str,
    train: tuple[Tensor, Tensor, Tensor],
    held_out: tuple[Tensor, Tensor, Tensor],
    count: int,
    variances: Sequence[float] = VARIANCES,
) -> float:
    """Choose the prior variance for these people; 0: no offsets.

    For regression it is the most likely one, given how far people's mean residuals lie apart; else the one whose
    offsets have the lowest loss on held-out examples, if that is lower than without offsets.

    Args:
        task: see :func:`losses`.
        train: logits, targets and rows.
        held_out: the same of other examples of these people.
        count: of people.
        variances: to try.
    """
    if task == "regression":
        return _likeliest(*train, count, variances)
    logits, targets, rows = held_out
    if not len(logits):
        return 0.3
    best = float(losses(task, logits, targets).mean())
    chosen = 0.0
    for variance in variances:
        offsets = fit_offsets(task, *train, count, variance)
        found = float(losses(task, logits + offsets[rows], targets).mean())
        if found < best:
            best, chosen = found, variance
    return chosen


def _likeliest(logits: Tensor, targets: Tensor, rows: Tensor, count: int, variances: Sequence[float]) -> float:
    """The variance v, in units of the noise s^2, with which mean residuals ``r_u ~ N(0, s^2 (v + 1 / n_u))`` fit."""
    residuals = (targets - logits.view(-1)).double()
    counts = torch.bincount(rows, minlength=count).double()
    means = torch.zeros(count, dtype=torch.double).index_add_(0, rows, residuals) / counts.clamp_min(1)
    noise = (residuals - means[rows]).pow(2).sum() / (len(rows) - (counts > 0).sum()).clamp_min(1)
    means, counts = means[counts > 0], counts[counts > 0]

    def misfit(variance: float) -> float:
        spread = noise.clamp_min(1e-12) * (variance + 1 / counts)
        return float((spread.log() + means**2 / spread).sum())

    return min((0.0, *variances), key=misfit)


def without_offsets(bank: ProfileBank) -> ProfileBank:
    """The same masks and head."""
    content = bank.content()
    assert content.names is not None
    return ProfileBank(bank.config, content.bits, content.gain_bits, content.names, content.shared)
