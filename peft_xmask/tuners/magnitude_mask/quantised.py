"""Magnitude-masked values of a quantised linear module: a sparse path beside the unchanged weight.

```
y = module(x) + x delta^T,    delta [out, in] with n numbers
```
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...errors import MergeError, TargetError
from ..base.peft_private import quantisation_backend
from ..in_place.autograd import Change
from ..in_place.flat_indices import FlatIndices
from ..in_place.sparse_gradients import product_at
from .layer import MagnitudeMaskLayer


def is_quantised(module: nn.Module) -> bool:
    """Whether a module's weight is quantised."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and (not weight.is_floating_point() or quantisation_backend(module) is not None)


def dequantised_weight(name: str, module: nn.Module) -> Tensor:
    """The dequantised weight of a module, in the dtype that it dequantises to.

    Raises:
        TargetError: they cannot be read.
    """
    backend, kind = quantisation_backend(module), type(getattr(module, "weight", None)).__name__
    try:
        if backend is not None and isinstance(getattr(module, "in_features", None), int):
            weight: Tensor = backend.get_base_weight(module).detach()
            return weight
    except (TypeError, NotImplementedError):  # a kind of which PEFT or torchao know that it cannot be read
        pass
    raise TargetError(
        f"The weight of '{name}' is quantised ({type(module).__name__}, {kind}), and its magnitudes cannot be read. "
        "Quantise with bitsandbytes (int8, nf4, fp4) or torchao, use the base unquantised, or add the module to "
        "exclude_modules."
    )


class QuantisedMaskLayer(MagnitudeMaskLayer):
    """A quantised linear module and the masks of its adapters. Nothing is ever written into it."""

    @property
    def dtype(self) -> torch.dtype:
        """Of values beside a weight that has no floating point dtype of its own."""
        return torch.float32

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The module's output and what the active adapters add to it.

        Args:
            x: ``[..., in_features]``.
            adapter_names: one adapter name, or ``"__base__"``, for each example of the batch.
        """
        y = self.base_layer(x, *args, **kwargs)
        if adapter_names is None or self.disable_adapters:
            return self._beside(self._wanted(), x, y)
        if len(adapter_names) != x.shape[0]:
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {len(adapter_names)} "
                f"and {x.shape[0]} respectively."
            )
        out = y.clone()
        for name in dict.fromkeys(adapter_names):
            rows = [i for i, other in enumerate(adapter_names) if other == name]
            if self.has(name):
                out[rows] = self._beside([name], x[rows], y[rows])
        return out

    def _beside(self, names: list[str], x: Tensor, y: Tensor) -> Tensor:
        for name in names:
            if not torch.compiler.is_compiling():
                self.version(name)  # checks that the values are finite
            for change in self.changes(name):
                y = y + self._added(change, x, y.shape[-1]).to(y.dtype)
        return y

    def _added(self, change: Change, x: Tensor, width: int) -> Tensor:
        assert change.indices is not None
        delta = change.delta.to(x.device)
        if change.name == "bias":
            return delta.new_zeros(width).index_add(0, change.indices.on(x.device), delta)
        added: Tensor = _SparsePath.apply(x, delta, change.indices)  # type: ignore[no-untyped-call]
        return added

    def sync(self, names: Sequence[str] | None = None) -> None:
        """Do nothing: the weight is never written into."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not supported.

        Raises:
            MergeError: always.
        """
        raise MergeError(f"Cannot merge: {self.why_not_mergeable()}")

    def why_not_mergeable(self) -> str:
        """Why nothing can be merged into the module."""
        kind = type(self.get_base_layer().weight).__name__
        return f"its weight is quantised ({kind}): merging would round it. Use the adapter unmerged."


class _SparsePath(torch.autograd.Function):
    """``x delta^T``, float32. What is kept for the backward pass is the input and the n numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, indices: FlatIndices) -> Tensor:
        ctx.indices = indices
        ctx.save_for_backward(x, delta)
        with torch.autocast(x.device.type, enabled=False):
            read = x.reshape(-1, x.shape[-1]).float()
            added: Tensor = (_matrix(indices, delta) @ read.t()).t()
        return added.reshape(*x.shape[:-1], indices.shape[0])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, delta = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            written = grad.reshape(-1, grad.shape[-1]).float()
            for_x = for_delta = None
            if ctx.needs_input_grad[0]:
                for_x = (written @ _matrix(ctx.indices, delta)).reshape(x.shape).to(x.dtype)
            if ctx.needs_input_grad[1]:
                read = x.reshape(-1, x.shape[-1]).float()
                for_delta = product_at(written, read, ctx.indices).to(delta.dtype)
        return for_x, for_delta, None


def _matrix(indices: FlatIndices, delta: Tensor) -> Tensor:
    indices.on(delta.device)
    pattern = indices.pattern(torch.float32)
    return torch.sparse_csr_tensor(
        pattern.crow_indices(), pattern.col_indices(), delta.float(), size=pattern.shape, check_invariants=False
    )
