"""Gradients of some numbers of a frozen parameter, without a gradient of the parameter.

The module runs its own forward pass on the parameter as it is; a backward pass hands out the gradient in the places
asked for and keeps nothing else.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

SAMPLED_DENSITY = 0.05
"""Up to this share of a matrix, its gradient on a CPU is computed in the places alone; see docs/magnitude_mask.md."""


class Places:
    """Some positions of a parameter.

    Attributes:
        index: long, ``[n]``, ascending positions in the flat parameter.
        shape: of the parameter.
    """

    def __init__(self, index: Tensor, shape: Sequence[int]) -> None:
        self.shape = torch.Size(shape)
        self.index = index
        self._pattern: Tensor | None = None

    def __len__(self) -> int:
        return self.index.numel()

    def on(self, device: torch.device) -> Tensor:
        """The positions, on a device; the same tensor each time, as long as the device is the same."""
        if self.index.device != device:
            self.index, self._pattern = self.index.to(device), None
        return self.index

    def pattern(self, dtype: torch.dtype) -> Tensor:
        """A sparse CSR matrix of zeros with an entry in each place. For parameters with two dimensions."""
        if self._pattern is None or self._pattern.dtype != dtype:
            rows, columns = self.shape
            index = self.index
            starts = torch.searchsorted(index, torch.arange(rows + 1, device=index.device) * columns)
            with warnings.catch_warnings():  # torch announces that its sparse tensors are new
                warnings.simplefilter("ignore")
                self._pattern = torch.sparse_csr_tensor(
                    starts.int(),
                    (index % columns).int(),
                    torch.zeros(len(self), dtype=dtype, device=index.device),
                    size=(rows, columns),
                    check_invariants=False,
                )
        return self._pattern

    def __getstate__(self) -> dict[str, Any]:
        """Without what a copy computes anew."""
        return {**self.__dict__, "_pattern": None}


@dataclass(frozen=True)
class Change:
    """What is trained in one parameter of a module.

    Attributes:
        name: of the parameter in its module.
        places: None: the whole parameter.
        delta: ``[n]`` or of the parameter's shape; the forward pass finds it added to the parameter already.
    """

    name: str
    places: Places | None
    delta: Tensor


def run_changed(
    module: nn.Module,
    changes: Sequence[Change],
    before_backward: Callable[[], None],
    x: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """A module's own output, as a function of its input and of the changes that its parameters hold already.

    A linear module keeps no matrix for the backward pass but asks for it again. Other modules keep what torch keeps,
    which raises an error if the parameters are written to in between.

    Args:
        changes: those that are to get gradients; several for one parameter get the same one, each in its places.
        before_backward: sees to it that the module's parameters are what they are now; called in the backward pass.
        x: the module's input.
    """
    frozen = not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    linear = isinstance(module, (nn.Linear, Conv1D)) and frozen and not (args or kwargs)
    if linear and all(change.places is not None for change in changes) and not torch.compiler.is_compiling():
        deltas = (change.delta for change in changes)
        return _Linear.apply(module, changes, before_backward, x, *deltas)  # type: ignore[no-untyped-call]
    names = dict.fromkeys(change.name for change in changes)
    standing_in = {}
    for name in names:
        own = [change for change in changes if change.name == name]
        standing_in[name] = _StandIn.apply(  # type: ignore[no-untyped-call]
            getattr(module, name), [change.places for change in own], *(change.delta for change in own)
        )
    return functional_call(module, standing_in, (x, *args), kwargs)


class _StandIn(torch.autograd.Function):
    """The parameter itself, with the changes in it as inputs."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, places: list[Places | None], *deltas: Tensor) -> Tensor:
        ctx.places = places
        ctx.forms = [(delta.shape, delta.dtype, delta.device) for delta in deltas]
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        dense = grad.to_dense() if grad.is_sparse else grad
        taken = [
            dense.reshape(shape) if places is None else dense.reshape(-1).index_select(0, places.on(dense.device))
            for places, (shape, _, _) in zip(ctx.places, ctx.forms, strict=True)
        ]
        own = grad if ctx.needs_input_grad[0] else None
        given = [one.to(device, dtype) for one, (_, dtype, device) in zip(taken, ctx.forms, strict=True)]
        return (own, None, *given)


class _Linear(torch.autograd.Function):
    """A linear module's output; the gradient of its matrix exists in the places only."""

    @staticmethod
    def forward(
        ctx: Any,
        module: nn.Linear | Conv1D,
        changes: Sequence[Change],
        before_backward: Callable[[], None],
        x: Tensor,
        *deltas: Tensor,
    ) -> Tensor:
        ctx.module, ctx.before_backward = module, before_backward
        ctx.places = [(change.name, change.places) for change in changes]
        ctx.forms = [(delta.dtype, delta.device) for delta in deltas]
        ctx.save_for_backward(x if deltas else None)
        ctx.dtype = x.dtype
        y: Tensor = module(x)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        turned = isinstance(ctx.module, Conv1D)
        for_x = None
        if ctx.needs_input_grad[3]:
            ctx.before_backward()
            matrix = ctx.module.weight.to(grad.dtype)
            for_x = grad.matmul(matrix.t() if turned else matrix).to(ctx.dtype)
        if not ctx.places:
            return (None, None, None, for_x)
        (x,) = ctx.saved_tensors
        written = grad.reshape(-1, grad.shape[-1])
        read = x.reshape(-1, x.shape[-1]).to(grad.device)
        left, right = (read, written) if turned else (written, read)
        found: dict[tuple[str, int], Tensor] = {}
        for name, places in ctx.places:
            if (name, id(places)) not in found:
                found[name, id(places)] = (
                    written.sum(0).index_select(0, places.on(grad.device))
                    if name == "bias"
                    else product_in_places(left, right, places)
                )
        given = [
            found[name, id(places)].to(device, dtype)
            for (name, places), (dtype, device) in zip(ctx.places, ctx.forms, strict=True)
        ]
        return (None, None, None, for_x, *given)


def product_in_places(left: Tensor, right: Tensor, places: Places) -> Tensor:
    """Some entries of ``left^T right``.

    On a CPU, and where the entries are few, they are computed alone; elsewhere the product is computed and freed.

    Shapes: ``[T, rows], [T, columns] -> [n]``, the entries in the order of ``places``.
    """
    index = places.on(left.device)
    if left.device.type == "cpu" and len(places) <= SAMPLED_DENSITY * places.shape.numel():
        wide = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
        pattern = places.pattern(wide)
        rows, columns = left.t().to(wide).contiguous(), right.t().to(wide).contiguous()
        product: Tensor = torch.sparse.sampled_addmm(pattern, rows, columns.t(), beta=0.0)
        return product.values()
    common = left.dtype
    return (left.t() @ right.to(common)).view(-1).index_select(0, index)
