"""The part of a pool that one site needs, with one copy of each tensor per process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from torch import Tensor, nn

Key = TypeVar("Key", bound=Hashable)


_HELD: WeakValueDictionary[Hashable, Tensor] = WeakValueDictionary()


def hold(keys: Sequence[Key], make: Callable[[list[Key]], Sequence[Tensor]]) -> list[Tensor]:
    """Tensors for ``keys``: existing ones that some model still uses, and new ones for the rest.

    This function keeps nothing alive: a tensor is freed with the last module or pool that refers to it.

    Args:
        keys: each determines a tensor's values and dtype completely.
        make: called once with the keys of missing tensors, if there are any.

    Returns:
        One tensor for each key, in order.
    """
    found = {key: tensor for key in keys if (tensor := _HELD.get(key)) is not None}
    missing = [key for key in dict.fromkeys(keys) if key not in found]
    if missing:
        made = dict(zip(missing, make(missing), strict=True))
        for key, tensor in made.items():
            _HELD[key] = found[key] = tensor
    return [found[key] for key in keys]


class PoolSlice(nn.Module):
    """N frozen adapters for one site, as buffers that are never trained, saved or copied.

    Shapes: ``down [N, b, d_in]``, ``up [N, d_out, b]``, ``down_bias [N, b]`` or None, ``up_bias [N, d_out]`` or None.
    With ``coefficients [N, K]`` these have K in place of N, and adapter n is ``sum_k coefficients[n, k] down[k]``,
    likewise its other parts.

    Attributes:
        origin: identifies the pool and the part of it; slices of equal origin hold equal values.
        common: the always-on adapter of the site, as a slice of one; None: there is none.
        common_inside: whether it is added to the mixed matrices; otherwise it stands beside the mix. See
            :mod:`peft_xmask.pool.common`.
    """

    down: Tensor
    up: Tensor
    down_bias: Tensor | None
    up_bias: Tensor | None
    coefficients: Tensor | None
    common: PoolSlice | None

    def __init__(
        self,
        down: Tensor,
        up: Tensor,
        down_bias: Tensor | None = None,
        up_bias: Tensor | None = None,
        *,
        coefficients: Tensor | None = None,
        origin: tuple[Hashable, ...],
        common: PoolSlice | None = None,
        common_inside: bool = False,
    ) -> None:
        super().__init__()
        self.origin = origin
        self.common = common
        self.common_inside = common_inside
        parts = {"down": down, "up": up, "down_bias": down_bias, "up_bias": up_bias, "coefficients": coefficients}
        for name, tensor in parts.items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def nbytes(self) -> int:
        """Bytes held by the buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def around(self, common: PoolSlice, inside: bool) -> PoolSlice:
        """The same directions with an always-on adapter."""
        return PoolSlice(
            self.down, self.up, self.down_bias, self.up_bias, coefficients=self.coefficients,
            origin=(self.origin, common.origin, inside), common=common, common_inside=inside,
        )  # fmt: skip

    @property
    def row_nbytes(self) -> int:
        """Bytes of one mixed adapter."""
        parts = [part for part in (self.down, self.up, self.down_bias, self.up_bias) if part is not None]
        common = 0 if self.common is None or self.common_inside else self.common.nbytes
        return sum(part[0].nbytes for part in parts) + common

    def __deepcopy__(self, memo: dict[int, Any]) -> PoolSlice:
        """Share the tensors: a frozen pool is held once, however often a model is copied."""
        twin = PoolSlice(
            self.down, self.up, self.down_bias, self.up_bias, coefficients=self.coefficients,
            origin=self.origin, common=copy.deepcopy(self.common, memo), common_inside=self.common_inside,
        )  # fmt: skip
        memo[id(self)] = twin
        return twin

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PoolSlice:
        """Move or cast the tensors, and nothing else: ``to_empty`` would leave memory without values.

        A model on the meta device gets its memory in that way, but a pool is never there, and no checkpoint holds it.
        Coefficients are not cast: rounded ones would not cancel in the mask that profiles start from.
        """
        if self.common is not None:
            self.common._apply(fn, recurse)
        for name, tensor in self._buffers.items():
            if tensor is None:
                continue
            like = fn(tensor.new_empty(0))
            dtype = tensor.dtype if name == "coefficients" else like.dtype
            moved = tensor.to(like.device, dtype)  # itself, if both are the same
            self._buffers[name] = moved.share_memory_() if like.is_shared() else moved
        return self

    def extra_repr(self) -> str:
        """Shapes, for ``print(model)``."""
        return f"down={tuple(self.down.shape)}, up={tuple(self.up.shape)}, dtype={str(self.down.dtype)[6:]}"
