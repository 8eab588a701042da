"""Offsets: numbers added to the model's outputs for one person, one for each label. A few bytes, computed at once.

An offset is the most likely one under a normal prior around zero: ``argmin_o sum_i loss(z_i + o, y_i) + |o|^2 / (2 v)``
over the person's examples i with logits z_i. So people with few examples stay close to the common part.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..bank.bank import ProfileBank
from ..training.offset_prior import VARIANCES, likeliest_variance

_KINDS = {"regression": "values", "classification": "classes", "multi-label": "labels"}


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


def choose_variance(task: str, logits: Tensor, targets: Tensor, rows: Tensor) -> float:
    """The prior variance of these people's offsets under which their labels are most likely; 0: no offsets.

    Args:
        task: see :func:`losses`.
        logits: of their training examples, ``[n, C]``, without offsets.
        targets: see :func:`losses`.
        rows: long ``[n]``, the number of each example's person.

    See :mod:`~peft_xmask.training.offset_prior`.
    """
    if not len(logits):
        return 0.0
    return likeliest_variance(_KINDS[task], logits, targets, rows, partial(fit_offsets, task), (0.0, *VARIANCES))


def without_offsets(bank: ProfileBank) -> ProfileBank:
    """The same masks and head."""
    content = bank.content()
    assert content.names is not None
    return ProfileBank(bank.config, content.bits, content.gain_bits, content.names, content.shared)
