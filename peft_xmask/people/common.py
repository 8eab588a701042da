"""The common part: one head on the base's mean hidden states, fitted to everybody's examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from ..integrations.pooled_classifier import MeanPooledClassifier
from ..pool import AdapterPool
from ..training.evaluation import label_losses
from ..tuners.xpeft import XPEFTConfig
from .examples import Row, by_length, inputs_of

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
"""Candidates for the weight of the head's squared norm, for features of unit variance."""


class SharedStates:
    """Mean hidden states of the base, with the common part of a pool if there is one; a context manager.

    While it is open, a pool's common part is attached to the model; afterwards the model is as it was.

    Args:
        model: with the base and a head.
        tokenizer: of the base.
        pool: its common part acts on the states; None: nothing does.
    """

    def __init__(
        self, model: MeanPooledClassifier, tokenizer: PreTrainedTokenizerBase, pool: AdapterPool | None
    ) -> None:
        self.classifier = model.classifier
        self.collate = DataCollatorWithPadding(tokenizer)
        self.model: Any = model
        self.adapted = pool is not None and pool.common is not None
        if self.adapted:
            self.model = get_peft_model(model, XPEFTConfig(pool=pool, num_profiles=1))
        self.model.eval()

    def __enter__(self) -> SharedStates:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Detach the common part."""
        if self.adapted:
            self.model.unload()

    @torch.no_grad()
    def of(self, examples: Sequence[Row]) -> Tensor:
        """States ``[n, d]`` of tokenised examples."""
        found = torch.empty(len(examples), self.classifier.in_features)
        read: list[Tensor] = []
        hook = self.classifier.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        try:
            for some in by_length(examples):
                inputs = self.collate([inputs_of(examples[place]) for place in some])
                batch = {name: part.to(self.model.device) for name, part in inputs.items()}
                if self.adapted:
                    batch["adapter_names"] = torch.full((len(some),), -1, device=self.model.device)
                self.model(**batch)
                found[torch.tensor(some)] = read.pop().float().cpu()
        finally:
            hook.remove()
        return found


def fit_head(
    model: MeanPooledClassifier,
    train: tuple[Tensor, Tensor, Tensor],
    held_out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Fit a head for each penalty, and give the model the one with the lowest loss on held-out examples.

    Args:
        model: whose ``classifier`` is set.
        train: states ``[n, d]``, labels (see :func:`~peft_xmask.training.evaluation.label_losses`), and what is added
            to the outputs of each example, ``[n, C]``.
        held_out: the same for other examples; if there are none, the second largest penalty is used.
    """
    states, targets, added = train
    mean, scale = states.mean(0), states.std(0).clamp_min(1e-6)
    best, chosen = float("inf"), None
    for penalty in PENALTIES if len(held_out[0]) else PENALTIES[-2:-1]:
        weight, bias = _fit((states - mean) / scale, targets, added, penalty)
        weight = weight / scale
        bias = bias - weight @ mean
        loss = 0.0
        if len(held_out[0]):
            loss = float(label_losses(held_out[0] @ weight.T + bias + held_out[2], held_out[1]).mean())
        if loss < best:
            best, chosen = loss, (weight, bias)
    assert chosen is not None
    with torch.no_grad():
        model.classifier.weight.copy_(chosen[0])
        model.classifier.bias.copy_(chosen[1])


def _fit(states: Tensor, targets: Tensor, added: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    outputs = added.shape[1]
    weight = torch.zeros(outputs, states.shape[1], requires_grad=True)
    value = targets.is_floating_point() and targets.dim() == 1
    start = targets.mean().expand(outputs) if value else torch.zeros(outputs)
    bias = start.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        total: Tensor = label_losses(states @ weight.T + bias + added, targets).mean() + penalty * (weight**2).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(objective)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
