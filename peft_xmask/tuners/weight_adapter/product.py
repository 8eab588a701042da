"""The change that an adapter makes to a parameter, ``s f(X D + c) U``, and its gradients.

X is the parameter as a matrix: one row for a vector, else one row for each output of the module. A gradient of X itself
is never needed: all that is asked of it, G, are the products ``G U^T`` and ``H^T G``, which for a linear module are
products of its input and of the gradient of its output with matrices of width r.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ...core.adapter import ACTIVATIONS
from ...errors import StaleGraphError


@dataclass(frozen=True, eq=False)
class Product:
    """The change of one parameter.

    Attributes:
        own: the parameter's own numbers, any shape.
        down: D, ``[d, r]``.
        up: U, ``[r, d]``.
        shift: c, ``[r]``; None: none.
        activation: name of f.
        scale: s.
        turned: whether the module's outputs are the columns of its weight (transformers' Conv1D).
        kept: ``[rows, r]``, factors of dropout; None: none.
    """

    own: Tensor
    down: Tensor
    up: Tensor
    shift: Tensor | None
    activation: str
    scale: float
    turned: bool = False
    kept: Tensor | None = None

    @property
    def factors(self) -> list[Tensor]:
        """What is trained."""
        return [self.down, self.up] if self.shift is None else [self.down, self.up, self.shift]

    def value(self) -> Tensor:
        """The change, float32, of the parameter's shape. Differentiable in the factors."""
        with torch.autocast(self.own.device.type, enabled=False):
            change = self._hidden(self._inner()) @ self.up.float()
        return (change.t() if self.turned else change).reshape(self.own.shape)

    def gradients(self, of_rows: Callable[[Tensor], Tensor], of_columns: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Gradients of the factors, from what is asked of the gradient G ``[rows, d]`` of the matrix.

        Args:
            of_rows: gives ``G m`` ``[rows, r]`` for ``m [d, r]``.
            of_columns: gives ``G^T m`` ``[d, r]`` for ``m [rows, r]``.
        """
        with torch.autocast(self.own.device.type, enabled=False):
            inner = self._inner().detach()
            with torch.enable_grad():
                hidden = self._hidden(inner.requires_grad_())
            for_up = of_columns(hidden.detach()).t()
            (for_inner,) = torch.autograd.grad(hidden, inner, of_rows(self.up.detach().t()).float())
            for_down = as_rows(self.own, self.turned).float().t() @ for_inner
        found = [for_down, for_up] if self.shift is None else [for_down, for_up, for_inner.sum(0)]
        return [grad.to(factor.dtype) for grad, factor in zip(found, self.factors, strict=True)]

    def gradients_of_dense(self, grad: Tensor) -> list[Tensor]:
        """Gradients of the factors from that of the parameter, of the parameter's shape."""
        matrix = as_rows(grad, self.turned).float()
        return self.gradients(lambda m: matrix @ m.float(), lambda m: matrix.t() @ m)

    def _inner(self) -> Tensor:
        inner = as_rows(self.own, self.turned).float() @ self.down.float()
        return inner if self.shift is None else inner + self.shift.float()

    def _hidden(self, inner: Tensor) -> Tensor:
        hidden = ACTIVATIONS[self.activation](inner) * self.scale
        return hidden if self.kept is None else hidden * self.kept


def as_rows(parameter: Tensor, turned: bool) -> Tensor:
    """A parameter as a matrix: ``[d] -> [1, d]``, ``[out, in, ...] -> [out, in * ...]``, turned ``[in, out]`` too."""
    if parameter.dim() == 1:
        return parameter.unsqueeze(0)
    return parameter.t() if turned else parameter.flatten(1)


def drawn_dropout(own: Tensor, r: int, turned: bool, probability: float) -> Tensor:
    """Factors of dropout, ``[rows, r]``."""
    rows = as_rows(own, turned).shape[0]
    return F.dropout(torch.ones(rows, r, device=own.device), probability)


@dataclass(frozen=True)
class Start:
    """Where factors start.

    Attributes:
        r: their width.
        has_shift: whether there is a ``c``.
        at_base: whether the change starts at zero.
    """

    r: int
    has_shift: bool
    at_base: bool = True

    def draw(self, own: Tensor, turned: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """``down``, ``up`` and ``shift``, float32, on the parameter's device; drawn by torch's CPU generator.

        ``D ~ N(0, 1/d)`` keeps the size of what is read. For a vector the signs of its columns are chosen so that
        ``b D`` is positive: with a ReLU a unit that starts below zero would never move. ``c`` is uniform in [0, 1)
        where all that is read is zero, else zero.
        """
        rows = as_rows(own.detach(), turned).float()
        width = rows.shape[1]
        down = (torch.randn(width, self.r) * width**-0.5).to(own.device)
        if rows.shape[0] == 1:
            down = torch.where(rows @ down < 0, -down, down)
        shift = None
        if self.has_shift:
            shift = torch.zeros(self.r) if bool(rows.any()) else torch.rand(self.r)
            shift = shift.to(own.device)
        up = torch.zeros(self.r, width) if self.at_base else torch.randn(self.r, width) * self.r**-0.5
        return down, up.to(own.device), shift


class _StandIn(torch.autograd.Function):
    """See :func:`standing_in`."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, products: Sequence[Product], *factors: Tensor) -> Tensor:
        ctx.products, ctx.seen = products, [factor._version for factor in factors]
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        _refuse_steps(ctx)
        own = grad if ctx.needs_input_grad[0] else None
        return (own, None, *(each for product in ctx.products for each in product.gradients_of_dense(grad)))


class _Linear(torch.autograd.Function):
    """See :func:`run_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        module: nn.Linear | Conv1D,
        products: Sequence[tuple[str, Product]],
        before_backward: Callable[[], None],
        x: Tensor,
        *factors: Tensor,
    ) -> Tensor:
        ctx.module, ctx.before_backward, ctx.dtype = module, before_backward, x.dtype
        ctx.named, ctx.products = products, [product for _, product in products]
        ctx.seen = [factor._version for factor in factors]
        ctx.save_for_backward(x if any(name == "weight" for name, _ in products) else None)
        y: Tensor = module(x)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        for_x = None
        if ctx.needs_input_grad[3]:
            ctx.before_backward()
            matrix = ctx.module.weight.to(grad.dtype)
            for_x = grad.matmul(matrix.t() if isinstance(ctx.module, Conv1D) else matrix).to(ctx.dtype)
        _refuse_steps(ctx)
        (x,) = ctx.saved_tensors
        written = grad.reshape(-1, grad.shape[-1])
        read = None if x is None else x.reshape(-1, x.shape[-1]).to(grad.dtype)
        given: list[Tensor] = []
        for name, product in ctx.named:
            if name == "bias":
                given += product.gradients_of_dense(written.sum(0))
            else:
                assert read is not None
                given += _from_activations(product, written, read)
        return (None, None, None, for_x, *given)


def standing_in(parameter: Tensor, products: Sequence[Product]) -> Tensor:
    """A parameter that holds its changes already, with gradients for their factors."""
    factors = [factor for product in products for factor in product.factors]
    stand_in: Tensor = _StandIn.apply(parameter, products, *factors)  # type: ignore[no-untyped-call]
    return stand_in


def run_linear(
    module: nn.Linear | Conv1D, products: Sequence[tuple[str, Product]], before_backward: Callable[[], None], x: Tensor
) -> Tensor:
    """A linear module's output, with gradients for the factors of the changes that its parameters hold already.

    It costs the backward pass of a LoRA of the same width and nothing in the forward pass; no gradient of the weight
    exists at any time.

    Args:
        products: with the names of the parameters that they are in.
        before_backward: sees to it that the module's parameters are what they are now; called in the backward pass.
    """
    factors = [factor for _, product in products for factor in product.factors]
    y: Tensor = _Linear.apply(module, products, before_backward, x, *factors)  # type: ignore[no-untyped-call]
    return y


def _from_activations(product: Product, written: Tensor, read: Tensor) -> list[Tensor]:
    """For ``G = written^T read``: ``G m = written^T (read m)``, ``G^T m = read^T (written m)``. Both ``[T, *]``."""
    return product.gradients(
        lambda m: (written.t() @ (read @ m.to(read.dtype))).float(),
        lambda m: (read.t() @ (written @ m.to(written.dtype))).float(),
    )


def _refuse_steps(ctx: Any) -> None:
    now = [factor._version for product in ctx.products for factor in product.factors]
    if now != ctx.seen:
        raise StaleGraphError(
            "Expected an adapter as it was in the forward pass, found that it was changed since. Run backward before "
            "the optimizer's step."
        )
