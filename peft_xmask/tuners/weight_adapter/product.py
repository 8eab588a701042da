"""The change that an adapter makes to a parameter, ``s f(X D + c) U``, and its gradients.

X is the parameter as a matrix: one row for a vector, else one row for each output of the module. Of its gradient, G,
only the products ``G U^T`` and ``H^T G`` are needed. For a linear module these are products of its input, and of the
gradient of its output, with matrices of width r.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...core.adapter import ACTIVATIONS
from ..in_place.autograd import TrainedChange
from ..in_place.rows import Rows, as_rows, from_rows
from ..in_place.sparse_gradients import ParameterGradient


@dataclass(frozen=True, eq=False)
class Product(TrainedChange):
    """The change of one parameter.

    Attributes:
        name: of the parameter in its module.
        own: the parameter's original values, any shape.
        down: D, ``[d, r]``.
        up: U, ``[r, d]``.
        shift: c, ``[r]``; None: none.
        activation: name of f.
        scale: s.
        rows: how the parameter is stored.
        kept: ``[rows, r]``, factors of dropout; None: none.
    """

    name: str
    own: Tensor
    down: Tensor
    up: Tensor
    shift: Tensor | None
    activation: str
    scale: float
    rows: Rows = Rows.FIRST
    kept: Tensor | None = None
    linear = False

    @property
    def trained(self) -> list[Tensor]:
        """The factors."""
        return [self.down, self.up] if self.shift is None else [self.down, self.up, self.shift]

    def value(self) -> Tensor:
        """The change, float32, of the parameter's shape. Differentiable in the factors."""
        with torch.autocast(self.own.device.type, enabled=False):
            change = self._hidden(self._inner()) @ self.up.float()
        return from_rows(change, self.rows, self.own)

    def gradients(self, gradient: ParameterGradient) -> list[Tensor]:
        """Gradients of the factors, from the parameter's."""
        with torch.autocast(self.own.device.type, enabled=False):
            inner = self._inner().detach()
            with torch.enable_grad():
                hidden = self._hidden(inner.requires_grad_())
            for_up = gradient.transpose_times(hidden.detach()).t()
            (for_inner,) = torch.autograd.grad(hidden, inner, gradient.times(self.up.detach().t()))
            for_down = as_rows(self.own, self.rows).float().t() @ for_inner
        return [for_down, for_up] if self.shift is None else [for_down, for_up, for_inner.sum(0)]

    def _inner(self) -> Tensor:
        inner = as_rows(self.own, self.rows).float() @ self.down.float()
        return inner if self.shift is None else inner + self.shift.float()

    def _hidden(self, inner: Tensor) -> Tensor:
        hidden = ACTIVATIONS[self.activation](inner) * self.scale
        return hidden if self.kept is None else hidden * self.kept


def drawn_dropout(own: Tensor, r: int, rows: Rows, probability: float) -> Tensor:
    """Factors of dropout, ``[rows, r]``."""
    return F.dropout(torch.ones(len(as_rows(own, rows)), r, device=own.device), probability)


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

    def draw(self, own: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor | None]:
        """``down``, ``up`` and ``shift``, float32, on the parameter's device; drawn by torch's CPU generator.

        ``D ~ N(0, 1/d)`` keeps the size of what is read. For a vector the signs of its columns are chosen so that
        ``b D`` is positive: with a ReLU a unit that starts below zero would never move. ``c`` is uniform in [0, 1)
        where all that is read is zero, else zero.
        """
        read = as_rows(own.detach(), rows).float()
        width = read.shape[1]
        down = (torch.randn(width, self.r) * width**-0.5).to(own.device)
        if read.shape[0] == 1:
            down = torch.where(read @ down < 0, -down, down)
        shift = None
        if self.has_shift:
            shift = torch.zeros(self.r) if bool(read.any()) else torch.rand(self.r)
            shift = shift.to(own.device)
        up = torch.zeros(self.r, width) if self.at_base else torch.randn(self.r, width) * self.r**-0.5
        return down, up.to(own.device), shift
