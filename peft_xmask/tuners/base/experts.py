"""Mixtures of experts whose weights are fused: one parameter for all experts, with three dimensions."""

from __future__ import annotations

import inspect

from torch import nn


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module holds the weights of several experts as parameters ``[experts, ..., ...]`` of its own."""
    return "weight" not in module._parameters and any(
        parameter is not None and parameter.dim() == 3 and parameter.is_floating_point()
        for parameter in module._parameters.values()
    )


def experts_width(module: nn.Module) -> int | None:
    """Width of what fused experts read and write, token by token; None for any other module.

    Some (Llama 4) are given every token once for each expert, in the order of the experts: what they read is not one
    row for each token of the batch, so None for them too.
    """
    if not is_fused_experts(module):
        return None
    width = getattr(module, "hidden_size", None) or getattr(module, "hidden_dim", None)
    routed = len(inspect.signature(module.forward).parameters) >= 3  # tokens, experts of each, their weights
    return width if isinstance(width, int) and routed else None
