"""Losses of each profile on its own examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from . import distributed as ranks
from .data import by_length

ExampleLoss = Callable[[Any, Any], Tensor]
"""Called with a model's outputs and the batch; gives a loss for each example, ``[B]``, lower being better."""


def label_losses(outputs: Tensor, labels: Tensor) -> Tensor:
    """Loss of each example, ``[n]``, by the form of its label.

    - A class, long ``[n]``: cross-entropy in nats of logits ``[n, C]``.
    - A value, float ``[n]``: squared error of outputs ``[n, 1]``.
    - Several labels, float ``[n, C]``, 1 where a label applies, else 0: binary cross-entropy in nats of logits
      ``[n, C]``, the sum over the labels.
    """
    outputs = outputs.float()
    if not labels.is_floating_point():
        return F.cross_entropy(outputs, labels, reduction="none")
    if labels.dim() == 2:
        return F.binary_cross_entropy_with_logits(outputs, labels.float(), reduction="none").sum(1)
    squared: Tensor = (outputs.view(-1) - labels.float()) ** 2
    return squared


def example_losses(outputs: Any, batch: Any, *, causal: bool = False) -> Tensor:
    """Loss of each example of a batch, from ``outputs.logits`` and ``batch["labels"]``.

    With ``logits [B, C]`` and ``labels [B]`` or ``[B, C]``: :func:`label_losses`. With ``logits [B, T, C]`` and
    whole-numbered ``labels [B, T]``: mean cross-entropy in nats over an example's labels that are not -100
    (``causal``: position t predicts label t + 1).

    Raises:
        ConfigError: other labels.
    """
    labels, logits = batch.get("labels"), outputs.logits
    if labels is None or not (
        (labels.dim() in (1, 2) and not labels.is_floating_point() and logits.dim() == labels.dim() + 1)
        or (labels.is_floating_point() and logits.numel() == labels.numel() == len(labels))
        or (labels.is_floating_point() and logits.shape == labels.shape and labels.dim() == 2)
    ):
        found = "no labels" if labels is None else f"labels {labels.dtype} {tuple(labels.shape)}"
        raise ConfigError(
            f"Expected labels whose loss is known for each example, found {found} with logits {tuple(logits.shape)}. "
            "Pass example_loss=, a function of the model's outputs and the batch."
        )
    if labels.numel() == len(labels):
        return label_losses(logits.view(len(labels), -1), labels.view(-1))
    if labels.is_floating_point():
        return label_losses(logits, labels)
    if causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
    mean: Tensor = losses.sum(1) / (labels != -100).sum(1).clamp_min(1)
    return mean


class Evaluator:
    """Mean loss of each profile on its validation examples.

    Args:
        dataset: the examples.
        rows: long ``[n]``, the row of each example's profile.
        count: U, the number of profiles.
        collator: that of the training.
        batch_size: examples in a forward pass.
        example_loss: what a loss is.
    """

    def __init__(
        self, dataset: Any, rows: Tensor, count: int, collator: Any, batch_size: int, example_loss: ExampleLoss
    ) -> None:
        self.dataset, self.rows, self.collator, self.batch_size = dataset, rows, collator, batch_size
        self.example_loss = example_loss
        self.counts = torch.bincount(rows, minlength=count)
        self._order = by_length(dataset, torch.arange(len(rows)))  # less padding to compute

    def losses(self, model: nn.Module, wanted: Tensor | None = None, *, shared: bool = False) -> Tensor:
        """Mean losses, float64 ``[U]``: NaN of profiles without examples, infinity where they are not numbers.

        The model is left in the mode it was in. Several processes share the work, and get the same bits.

        Args:
            wanted: bool ``[U]``, the profiles to evaluate; None: all.
            shared: evaluate what all profiles share, without their rows.
        """
        places = self._order if wanted is None else self._order[wanted[self.rows[self._order]]]
        totals = torch.zeros(len(self.counts), dtype=torch.float64)
        device = next(model.parameters()).device
        training = model.training
        model.eval()
        try:
            chunks = places.split(self.batch_size) if len(places) else ()
            for chunk in chunks[ranks.number() :: ranks.count()]:
                batch = self.collator([self.dataset[place] for place in chunk.tolist()])
                batch = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
                if shared:
                    batch["adapter_names"].fill_(-1)
                with torch.no_grad():
                    found = self.example_loss(model(**batch), batch)
                totals.index_add_(0, self.rows[chunk], found.double().cpu().nan_to_num(torch.inf, torch.inf))
        finally:
            model.train(training)
        totals = ranks.total(totals, device)
        judged = self.counts > 0 if wanted is None else wanted & (self.counts > 0)
        return torch.where(judged, totals / self.counts.clamp_min(1), torch.nan)
