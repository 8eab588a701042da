"""Tensors as modules with a ``.weight``, which trl's reference copies and FSDP's wrap policy look for."""

from __future__ import annotations

from torch import Tensor, nn


class Trained(nn.Module):
    """A trainable tensor."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class Shipped(nn.Module):
    """Bytes: a buffer, which no optimizer moves and no cast changes."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
