"""Running models and looking at their weights."""

from typing import Any

import torch
from torch import Tensor, nn


def first_tensor(output: Any) -> Tensor:
    """Logits or hidden states of whatever a model returns."""
    return output if isinstance(output, Tensor) else output[0]


def run(model: nn.Module, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
    """The model's output, without gradients."""
    with torch.no_grad():
        return first_tensor(model(**batch, **kwargs))


def first_scores(model: Any, prompt: dict[str, Tensor], **kwargs: Any) -> Tensor:
    """Scores of the first token that a model generates."""
    with torch.no_grad():
        made = model.generate(
            **prompt, max_new_tokens=2, return_dict_in_generate=True, output_scores=True, do_sample=False, **kwargs
        )
    return made.scores[0]


def copied_state(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a model's state, copied."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two states have the same names and bit-identical tensors."""
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )
