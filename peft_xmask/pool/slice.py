"""The part of a pool that one site needs."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor, nn


class PoolSlice(nn.Module):
    """N frozen adapters for one site, as buffers that are never trained, saved or copied.

    Shapes: ``down [N, b, d_in]``, ``up [N, d_out, b]``, ``down_bias [N, b]`` or None, ``up_bias [N, d_out]`` or None.

    Attributes:
        origin: which part of which pool this is; two slices of equal origin hold the same numbers.
    """

    down: Tensor
    up: Tensor
    down_bias: Tensor | None
    up_bias: Tensor | None

    def __init__(
        self,
        down: Tensor,
        up: Tensor,
        down_bias: Tensor | None = None,
        up_bias: Tensor | None = None,
        *,
        origin: tuple[Hashable, ...],
    ) -> None:
        super().__init__()
        self.origin = origin
        for name, tensor in (("down", down), ("up", up), ("down_bias", down_bias), ("up_bias", up_bias)):
            self.register_buffer(name, tensor, persistent=False)

    @property
    def nbytes(self) -> int:
        """Bytes held by the buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def __deepcopy__(self, memo: dict[int, Any]) -> PoolSlice:
        """Share the tensors: a frozen pool is held once however often a model is copied."""
        twin = PoolSlice(self.down, self.up, self.down_bias, self.up_bias, origin=self.origin)
        memo[id(self)] = twin
        return twin

    def extra_repr(self) -> str:
        """Shapes, for ``print(model)``."""
        return f"down={tuple(self.down.shape)}, up={tuple(self.up.shape)}, dtype={str(self.down.dtype)[6:]}"
