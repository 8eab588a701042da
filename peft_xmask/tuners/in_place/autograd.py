"""A module's forward pass, with gradients for what adapters have added to its frozen parameters.

The parameters hold the adapters' changes already, so the forward pass is the module's own. In the backward pass each
adapter takes what it needs from the parameter's gradient, see :mod:`peft_xmask.tuners.in_place.sparse_gradients`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from ...errors import StaleGraphError
from ..base.steps import count_steps, steps_taken
from .flat_indices import FlatIndices
from .rows import Rows, rows_of
from .sparse_gradients import DenseGradient, LinearWeightGradient, ParameterGradient


class TrainedChange(ABC):
    """What one adapter trains in one parameter of a module.

    Attributes:
        name: of the parameter in its module.
        linear: whether the change is linear in what is trained, so that its gradients do not depend on it.
    """

    name: str
    linear: bool

    @property
    @abstractmethod
    def trained(self) -> Sequence[Tensor]:
        """The tensors that are trained."""

    @property
    def needs_input(self) -> bool:
        """Whether a linear module has to keep its input for the gradients."""
        return self.name != "bias"

    @abstractmethod
    def gradients(self, gradient: ParameterGradient) -> Sequence[Tensor]:
        """Gradients of :attr:`trained`, in its order, from the parameter's."""


@dataclass(frozen=True, eq=False)
class Change(TrainedChange):
    """Numbers that are added to elements of a parameter: ``[n]`` at some of them, or one for each.

    Attributes:
        name: of the parameter in its module.
        indices: where; None: everywhere.
        delta: ``[n]`` or of the parameter's shape; the forward pass finds it added to the parameter already.
    """

    name: str
    indices: FlatIndices | None
    delta: Tensor
    linear = True

    @property
    def trained(self) -> list[Tensor]:
        """The numbers."""
        return [self.delta]

    def gradients(self, gradient: ParameterGradient) -> list[Tensor]:
        """The parameter's gradient, at the indices."""
        if self.indices is None:
            return [gradient.whole().reshape(self.delta.shape)]
        return [gradient.at(self.indices)]


def run_changed(
    module: nn.Module,
    changes: Sequence[TrainedChange],
    as_in_forward: Callable[[], AbstractContextManager[None]],
    x: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """A module's own output, as a function of its input and of the changes that its parameters hold already.

    A linear module keeps no matrix for the backward pass and never computes the gradient of its weight. Other modules
    keep what torch keeps, which raises an error if their parameters are written to before the backward pass.

    Args:
        changes: those that are to get gradients.
        as_in_forward: entered in the backward pass; inside, the module's parameters are what they are now.
        x: the module's input.
    """
    if not torch.compiler.is_compiling() and _is_plain_linear(module) and not (args or kwargs):
        trained = (tensor for change in changes for tensor in change.trained)
        return _RunLinear.apply(module, changes, as_in_forward, x, *trained)  # type: ignore[no-untyped-call]
    by_name: dict[str, list[TrainedChange]] = {}
    for change in changes:
        by_name.setdefault(change.name, []).append(change)
    tracked = {}
    for name, mine in by_name.items():
        trained = (tensor for change in mine for tensor in change.trained)
        rows = rows_of(module, name)
        tracked[name] = _TrackParameter.apply(getattr(module, name), mine, rows, *trained)  # type: ignore[no-untyped-call]
    return functional_call(module, tracked, (x, *args), kwargs)


class _TrackParameter(torch.autograd.Function):
    """The parameter itself, as a function of the changes in it."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, changes: Sequence[TrainedChange], rows: Rows, *trained: Tensor) -> Tensor:
        ctx.changes, ctx.rows = changes, rows
        _note_trained(ctx, trained)
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        _refuse_steps(ctx)
        gradient = DenseGradient(grad, ctx.rows)
        found = [each for change in ctx.changes for each in change.gradients(gradient)]
        own = grad if ctx.needs_input_grad[0] else None
        return (own, None, None, *_as_trained(ctx, found))


class _RunLinear(torch.autograd.Function):
    """A linear module's output. No gradient of its weight exists at any time, unless a change asks for all of it."""

    @staticmethod
    def forward(
        ctx: Any,
        module: nn.Linear | Conv1D,
        changes: Sequence[TrainedChange],
        as_in_forward: Callable[[], AbstractContextManager[None]],
        x: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        ctx.module, ctx.as_in_forward, ctx.dtype = module, as_in_forward, x.dtype
        ctx.changes = changes
        _note_trained(ctx, trained)
        ctx.save_for_backward(x if any(change.needs_input for change in changes) else None)
        y: Tensor = module(x)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        fan_in_fan_out = isinstance(ctx.module, Conv1D)
        for_x = None
        if ctx.needs_input_grad[3]:
            with ctx.as_in_forward():
                weight = ctx.module.weight.to(grad.dtype)
                for_x = grad.matmul(weight.t() if fan_in_fan_out else weight).to(ctx.dtype)
        _refuse_steps(ctx)
        written = grad.reshape(-1, grad.shape[-1])
        gradients: dict[str, ParameterGradient] = {}
        (x,) = ctx.saved_tensors
        if x is not None:
            read = x.reshape(-1, x.shape[-1]).to(grad.device)
            gradients["weight"] = LinearWeightGradient(written, read, fan_in_fan_out=fan_in_fan_out)
        if any(change.name == "bias" for change in ctx.changes):
            gradients["bias"] = DenseGradient(written.sum(0))
        found = [each for change in ctx.changes for each in change.gradients(gradients[change.name])]
        return (None, None, None, for_x, *_as_trained(ctx, found))


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes ``x W^T + b`` from frozen plain tensors, and nothing else."""
    if type(module) not in (nn.Linear, Conv1D) or module._forward_hooks or module._forward_pre_hooks:
        return False
    weight = module._parameters.get("weight")
    plain = weight is not None and type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()
    return plain and not any(parameter.requires_grad for parameter in module.parameters())


def _note_trained(ctx: Any, trained: Sequence[Tensor]) -> None:
    """Remember what the gradients have to look like and, for changes that are not linear, what was trained."""
    if not torch.compiler.is_compiling():
        count_steps()
    ctx.forms = [(tensor.dtype, tensor.device) for tensor in trained]
    ctx.seen = _versions(ctx)


def _versions(ctx: Any) -> list[int]:
    """Versions of what was trained, and how many steps were taken: fused optimizers raise no version.

    A compiled graph leaves out the steps: it would be compiled again after each of them.
    """
    versions = [tensor._version for change in ctx.changes if not change.linear for tensor in change.trained]
    return [*versions, steps_taken()] if versions and not torch.compiler.is_compiling() else versions


def _as_trained(ctx: Any, gradients: Sequence[Tensor]) -> list[Tensor]:
    return [grad.to(device, dtype) for grad, (dtype, device) in zip(gradients, ctx.forms, strict=True)]


def _refuse_steps(ctx: Any) -> None:
    if _versions(ctx) != ctx.seen:
        raise StaleGraphError(
            "Expected an adapter as it was in the forward pass, but it has been changed since. Run backward before the "
            "optimizer's step."
        )
