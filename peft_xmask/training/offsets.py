"""Offsets: a few numbers a profile, added to the model's outputs, of which there is a most likely value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .evaluation import label_losses

DEFAULT_VARIANCES = {"classes": 0.3, "labels": 0.3, "values": 0.1}
"""Of the prior, for a bank that does not say which it has."""

_STEPS = 50
_PRECISION = 1e-5  # of an offset
_NUMBERS = 50_000_000  # in the curvatures of the profiles whose offsets are computed at once
_FEW = 16  # classes, up to which outer products of each example cost less than a product of matrices for each profile
_EXAMPLES = 4096  # whose outer products are computed at once


@dataclass(frozen=True)
class SharedOutputs:
    """What a model answers without anything personal, and what it should have answered.

    Attributes:
        outputs: float32 ``[n, C]``: logits of C classes or labels, or one value.
        labels: see :func:`~peft_xmask.training.evaluation.label_losses`.
    """

    outputs: Tensor
    labels: Tensor

    @classmethod
    def of(cls, model: nn.Module, dataset: Any, collator: Callable[[list[Any]], Any], batch_size: int) -> SharedOutputs:
        """Run a model over examples, each without its profile.

        Raises:
            ConfigError: the outputs are not logits, nor one value for each example.
        """
        device = next(model.parameters()).device
        training = model.training
        model.eval()
        outputs, labels = [], []
        try:
            for start in range(0, len(dataset), batch_size):
                batch = collator([dataset[place] for place in range(start, min(start + batch_size, len(dataset)))])
                batch = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
                batch["adapter_names"].fill_(-1)
                label = batch.pop("labels", None)
                with torch.no_grad():
                    found = model(**batch).logits
                part = cls.checked(found, label)
                outputs.append(part.outputs)
                labels.append(part.labels)
        finally:
            model.train(training)
        return cls(torch.cat(outputs), torch.cat(labels))

    @classmethod
    def checked(cls, outputs: Tensor, labels: Tensor | None) -> SharedOutputs:
        """The outputs of one batch.

        Raises:
            ConfigError: the outputs are not logits, nor one value for each example.
        """
        if labels is not None:
            classes = labels.dim() == 1 and not labels.is_floating_point() and outputs.dim() == 2
            value = labels.is_floating_point() and outputs.numel() == labels.numel() == len(labels)
            several = labels.is_floating_point() and labels.dim() == 2 and outputs.shape == labels.shape
            if classes or value or several:
                labels = labels.cpu().view(len(labels)) if classes or value else labels.float().cpu()
                return cls(outputs.detach().float().cpu().view(len(labels), -1), labels)
        found = "no labels" if labels is None else f"labels {labels.dtype} {tuple(labels.shape)}"
        raise ConfigError(
            f"Offsets need a class, several labels or a value for each example, found {found} with outputs "
            f"{tuple(outputs.shape)}. Train without offset=True."
        )

    def __getitem__(self, places: Tensor) -> SharedOutputs:
        """Those of some examples."""
        return SharedOutputs(self.outputs[places], self.labels[places])

    def moved(self, by: Tensor) -> SharedOutputs:
        """With something added to the outputs."""
        return SharedOutputs(self.outputs + by, self.labels)

    @property
    def kind(self) -> str:
        """What the labels are: ``"classes"``, ``"labels"`` of which an example may have several, or ``"values"``."""
        if not self.labels.is_floating_point():
            return "classes"
        return "labels" if self.labels.dim() == 2 else "values"

    @property
    def default_variance(self) -> float:
        """The prior variance where nothing says another one."""
        return DEFAULT_VARIANCES[self.kind]

    @property
    def residuals(self) -> Tensor:
        """Of values, ``[n]``."""
        residuals: Tensor = self.labels.float() - self.outputs.view(-1)
        return residuals

    def losses(self) -> Tensor:
        """Of each example, ``[n]``."""
        return label_losses(self.outputs, self.labels)

    def likely(self) -> Tensor:
        """Probabilities ``[n, C]``."""
        return self.outputs.softmax(1) if self.kind == "classes" else self.outputs.sigmoid()

    def curvatures(self, rows: Tensor, count: int) -> Tensor:
        """The Hessian of each profile's loss by its offset, ``[U, C, C]``, in nats."""
        likely, classes = self.likely(), self.outputs.shape[1]
        if self.kind == "labels":
            return torch.diag_embed(likely.new_zeros(count, classes).index_add_(0, rows, likely * (1 - likely)))
        found = torch.diag_embed(likely.new_zeros(count, classes).index_add_(0, rows, likely))
        if classes <= _FEW:
            for some, mine in zip(likely.split(_EXAMPLES), rows.split(_EXAMPLES), strict=True):
                found.index_add_(0, mine, some.unsqueeze(2) * some.unsqueeze(1), alpha=-1)
            return found
        order = torch.argsort(rows, stable=True)
        sizes = torch.bincount(rows, minlength=count).tolist()
        for each, mine in zip(found, likely[order].split(sizes), strict=True):
            each.addmm_(mine.T, mine, alpha=-1)
        return found


def profiles_at_once(classes: int) -> int:
    """Of how many profiles the curvatures are held in memory."""
    return max(1, _NUMBERS // classes**2)


def fit_offsets(shared: SharedOutputs, rows: Tensor, count: int, variance: float) -> Tensor:
    """The most likely offset of each profile under a Gaussian prior of mean 0, float32 ``[U, C]``.

    Of values with residuals r: ``sum(r) / (n + 1 / variance)``, which is the mean residual of n examples, shrunk. Of
    classes and labels: the minimum over o of ``sum_i loss(z_i + o, y_i) + |o|^2 / (2 variance)``. A profile without
    examples has zeros.

    Args:
        shared: outputs on the examples.
        rows: long ``[n]``, the profile of each.
        count: U.
        variance: of the prior; 0: no offsets.

    Source: Newton's method, with Bach's steps for logistic losses (2010, "Self-concordant analysis for logistic
    regression").
    """
    offsets = torch.zeros(count, shared.outputs.shape[1])
    if variance <= 0 or not len(rows):
        return offsets
    if shared.kind == "values":
        examples = torch.bincount(rows, minlength=count).float()
        return (torch.zeros(count).index_add_(0, rows, shared.residuals) / (examples + 1 / variance)).unsqueeze(1)
    rows, order = torch.sort(rows, stable=True)
    for people in torch.arange(count).split(profiles_at_once(shared.outputs.shape[1])):
        first, last = torch.searchsorted(rows, torch.tensor([int(people[0]), int(people[-1]) + 1])).tolist()
        offsets[people] = _newton(shared[order[first:last]], rows[first:last] - people[0], len(people), variance)
    return offsets


def _newton(shared: SharedOutputs, rows: Tensor, count: int, variance: float) -> Tensor:
    """Newton's method, with steps short enough that none increases the loss."""
    offsets = torch.zeros(count, shared.outputs.shape[1])
    target = shared.labels
    if shared.kind == "classes":
        target = nn.functional.one_hot(target, offsets.shape[1]).float()
    prior = torch.eye(offsets.shape[1]) / variance
    for _ in range(_STEPS):
        now = shared.moved(offsets[rows])
        slope = torch.zeros_like(offsets).index_add_(0, rows, now.likely() - target) + offsets / variance
        step = torch.linalg.solve(now.curvatures(rows, count) + prior, slope)
        reach = 2 * step.abs().amax(1, keepdim=True)
        offsets -= step * torch.where(reach > 0, reach.log1p() / reach, 1.0)
        if step.abs().amax() < _PRECISION:
            break
    return offsets
