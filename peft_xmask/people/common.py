"""What all people share: one head on the base's mean hidden states, found from everybody's examples at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from ..integrations.pooled_classifier import MeanPooledClassifier, mean_pool
from .offsets import losses

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
"""Weights of the squared norm of the head that are tried, for features of unit variance."""


@torch.no_grad()
def pooled_states(
    model: MeanPooledClassifier, examples: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> Tensor:
    """Mean hidden states ``[n, d]`` of tokenised examples under the frozen base."""
    collate = DataCollatorWithPadding(tokenizer)
    order = sorted(range(len(examples)), key=lambda place: len(examples[place]["input_ids"]))
    found = torch.empty(len(examples), model.classifier.in_features)
    model.eval()
    for start in range(0, len(order), 64):
        some = order[start : start + 64]
        inputs = [
            {key: value for key, value in examples[place].items() if key not in ("labels", "user")} for place in some
        ]
        batch = {name: part.to(model.device) for name, part in collate(inputs).items()}
        states = model.backbone(**batch).last_hidden_state
        found[torch.tensor(some)] = mean_pool(states, batch["attention_mask"]).float().cpu()
    return found


def fit_head(
    model: MeanPooledClassifier,
    task: str,
    train: tuple[Tensor, Tensor, Tensor],
    held_out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Give the model the head with the lowest loss on held-out examples, over the penalties that are tried.

    Args:
        model: whose ``classifier`` is set.
        task: see :func:`~peft_xmask.people.offsets.losses`.
        train: states ``[n, d]``, targets, and what is added to the outputs of each example, ``[n, C]``.
        held_out: the same of other examples; without any, the largest penalty but one is taken.
    """
    states, targets, added = train
    mean, scale = states.mean(0), states.std(0).clamp_min(1e-6)
    best, chosen = float("inf"), None
    for penalty in PENALTIES if len(held_out[0]) else PENALTIES[-2:-1]:
        weight, bias = _fit((states - mean) / scale, targets, added, task, penalty)
        weight = weight / scale
        bias = bias - weight @ mean
        loss = 0.0
        if len(held_out[0]):
            loss = float(losses(task, held_out[0] @ weight.T + bias + held_out[2], held_out[1]).mean())
        if loss < best:
            best, chosen = loss, (weight, bias)
    assert chosen is not None
    with torch.no_grad():
        model.classifier.weight.copy_(chosen[0])
        model.classifier.bias.copy_(chosen[1])


def _fit(states: Tensor, targets: Tensor, added: Tensor, task: str, penalty: float) -> tuple[Tensor, Tensor]:
    outputs = added.shape[1]
    weight = torch.zeros(outputs, states.shape[1], requires_grad=True)
    start = targets.mean().expand(outputs) if task == "regression" else torch.zeros(outputs)
    bias = start.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        total = losses(task, states @ weight.T + bias + added, targets).mean() + penalty * (weight**2).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(objective)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
