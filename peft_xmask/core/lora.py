"""A linear adapter written as a LoRA: ``up (down x) + constant``, under the keys that PEFT saves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from .adapter import AdapterPair

KEY_PREFIX = "base_model.model."
"""What PEFT puts before a module's name in an adapter's file."""


class LinearChange(NamedTuple):
    """What a linear adapter adds to a module's output, as a function of the module's input: ``up (down x) + constant``.

    Shapes: ``down [b, in_features]``, ``up [out_features, b]``, ``constant [out_features]`` or None.
    """

    down: Tensor
    up: Tensor
    constant: Tensor | None


def parallel_change(pair: AdapterPair) -> LinearChange:
    """The change made by a linear adapter that reads the module's input."""
    inner = pair.down_bias
    constant = _sum(None if inner is None else pair.up.detach() @ inner.detach(), pair.up_bias)
    return LinearChange(pair.down.detach(), pair.up.detach(), constant)


def sequential_change(pair: AdapterPair, weight: Tensor, bias: Tensor | None) -> LinearChange:
    """The change made by a linear adapter that reads the module's output ``weight x + bias``.

    Args:
        pair: the adapter.
        weight: of the module, ``[out_features, in_features]``.
        bias: of the module, ``[out_features]``, or None.
    """
    down, up = pair.down.detach(), pair.up.detach()
    inner = _sum(pair.down_bias, None if bias is None else down @ bias.to(down.dtype))
    constant = _sum(None if inner is None else up @ inner, pair.up_bias)
    return LinearChange(down @ weight.to(down.dtype), up, constant)


@torch.no_grad()
def lora_tensors(changes: Mapping[str, LinearChange], rank: int | None = None) -> dict[str, Tensor]:
    """LoRA tensors in float32 by their key in an adapter's file.

    If one module has a constant, each has a bias of ``lora_B``: PEFT's ``lora_bias`` applies to a whole adapter.

    Args:
        changes: by module name.
        rank: rank of the LoRA; None: the rank of the changes. A larger rank is padded with zeros.

    Raises:
        ConfigError: ``rank`` is smaller than the rank of the changes.
    """
    has_bias = any(change.constant is not None for change in changes.values())
    tensors: dict[str, Tensor] = {}
    for name, (down, up, constant) in changes.items():
        missing = 0 if rank is None else rank - down.shape[0]
        if missing < 0:
            raise ConfigError(f"rank={rank} is invalid: these adapters have rank {down.shape[0]}. Pass at least that.")
        key = f"{KEY_PREFIX}{name}"
        tensors[f"{key}.lora_A.weight"] = F.pad(down.float(), (0, 0, 0, missing)).clone().cpu()
        tensors[f"{key}.lora_B.weight"] = F.pad(up.float(), (0, missing)).clone().cpu()
        if has_bias:
            bias = up.new_zeros(up.shape[0]) if constant is None else constant
            tensors[f"{key}.lora_B.bias"] = bias.float().clone().cpu()
    return tensors


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return first.detach() if first is not None else None if second is None else second.detach()
    return first.detach() + second.detach()
