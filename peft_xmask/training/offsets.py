"""Offsets: a few numbers a profile, added to the model's outputs, of which there is a most likely value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .offset_prior import likeliest_variance

DEFAULT_VARIANCES = {"classes": 0.3, "values": 0.1}
"""Of the prior, for a bank that does not say which it has."""

_ITERATIONS = 50


@dataclass(frozen=True)
class SharedOutputs:
    """What a model answers without anything personal.

    Attributes:
        outputs: float32 ``[n, C]``: logits of C classes, or one value.
        labels: ``[n]``: classes (long), or values (float32).
    """

    outputs: Tensor
    labels: Tensor

    @classmethod
    def of(cls, model: nn.Module, dataset: Any, collator: Callable[[list[Any]], Any], batch_size: int) -> SharedOutputs:
        """Run a model over examples, each without its profile.

        Raises:
            ConfigError: the outputs are not logits of classes, nor one value for each example.
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
            ConfigError: the outputs are not logits of classes, nor one value for each example.
        """
        if labels is not None:
            classes = labels.dim() == 1 and not labels.is_floating_point() and outputs.dim() == 2
            value = labels.is_floating_point() and outputs.numel() == labels.numel() == len(labels)
            if classes or value:
                return cls(outputs.detach().float().cpu().view(len(labels), -1), labels.cpu().view(len(labels)))
        found = "no labels" if labels is None else f"labels {labels.dtype} {tuple(labels.shape)}"
        raise ConfigError(
            f"Offsets need one class or one value for each example, found {found} with outputs "
            f"{tuple(outputs.shape)}. Train without offset=True."
        )

    def __getitem__(self, places: Tensor) -> SharedOutputs:
        """Those of some examples."""
        return SharedOutputs(self.outputs[places], self.labels[places])

    @property
    def values(self) -> bool:
        """Whether the model gives values, not classes."""
        return self.labels.is_floating_point()

    @property
    def default_variance(self) -> float:
        """The prior variance where nothing says another one."""
        return DEFAULT_VARIANCES["values" if self.values else "classes"]


def fit_offsets(shared: SharedOutputs, rows: Tensor, count: int, variance: float) -> Tensor:
    """The most likely offset of each profile under a Gaussian prior of mean 0, float32 ``[U, C]``.

    Of values with residuals r: ``sum(r) / (n + 1 / variance)``, which is the mean residual of n examples, shrunk. Of
    classes: the minimum of ``sum_i CE(z_i + o, y_i) + |o|^2 / (2 variance)``, by steps that a bound of the curvature
    keeps from ever going up (Boehning 1992). A profile without examples has zeros.

    Args:
        shared: outputs on the examples.
        rows: long ``[n]``, the profile of each.
        count: U.
        variance: of the prior; 0: no offsets.
    """
    if variance <= 0:
        return torch.zeros(count, shared.outputs.shape[1])
    examples = torch.bincount(rows, minlength=count).unsqueeze(1).float()
    if shared.values:
        residuals = shared.labels.float().view(-1, 1) - shared.outputs.view(-1, 1)
        return torch.zeros(count, 1).index_add_(0, rows, residuals) / (examples + 1 / variance)
    classes = shared.outputs.shape[1]
    target = nn.functional.one_hot(shared.labels, classes).float()
    offsets = torch.zeros(count, classes)
    scale = examples / 2 + 1 / variance
    for _ in range(_ITERATIONS):
        excess = (shared.outputs + offsets[rows]).softmax(1) - target
        slope = torch.zeros_like(offsets).index_add_(0, rows, excess) + offsets / variance
        along_ones = slope.sum(1, keepdim=True) * (examples / (2 * classes)) * variance
        offsets -= (slope + along_ones) / scale
    return offsets


def choose_variance(shared: SharedOutputs, rows: Tensor) -> float:
    """The prior variance under which the labels are most likely; see :mod:`~peft_xmask.training.offset_prior`.

    Args:
        shared: outputs on the training examples.
        rows: long ``[n]``, the profile of each.
    """

    def fit(outputs: Tensor, labels: Tensor, rows: Tensor, count: int, variance: float) -> Tensor:
        return fit_offsets(SharedOutputs(outputs, labels), rows, count, variance)

    return likeliest_variance("values" if shared.values else "classes", shared.outputs, shared.labels, rows, fit)
