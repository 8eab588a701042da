"""The values that the adapters of one model add to its parameters: one vector per adapter, at the model's root."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...errors import FileFormatError
from ..base.state import PackedTensor, RootTable, TrainableTensor
from .guard import PassGuard, State
from .override import Override
from .version import TensorVersion


class DeltaVector:
    """One adapter of the table: its vector, and how the vector is divided among the parameters.

    Args:
        name: of the adapter, for error messages.
        holder: the module that holds the vector ``[n]``. The tensor itself is looked up at each use, since PEFT
            replaces it when it casts.
        sizes: length of each part, in order; they add up to n.
        rounding: dtype to which every value is rounded before use, and in which it is saved; None: no rounding.
    """

    def __init__(
        self, name: str, holder: TrainableTensor | PackedTensor, sizes: Sequence[int], rounding: torch.dtype | None
    ) -> None:
        self.name, self.holder, self.sizes, self.rounding = name, holder, tuple(sizes), rounding
        self._starts = (0, *accumulate(sizes))
        self._version: TensorVersion | None = None
        self._parts: tuple[Tensor, ...] | None = None

    def version(self, *, check_finite: bool) -> TensorVersion:
        """The vector's version: the same object until the vector changes.

        Raises:
            FileFormatError: with ``check_finite``, the vector has changed and a value is not finite.
        """
        version = self._version
        if version is None or not version.is_current():
            if check_finite:
                refuse_non_finite(self.name, self.holder.weight)
            version = self._version = TensorVersion(self.holder)
            self._parts = None
        return version

    def part(self, index: int) -> Tensor:
        """One part of the vector, rounded; with a gradient where the vector has one."""
        weight = self.holder.weight
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return self._cut(weight.detach(), index)
        if torch.compiler.is_compiling():
            return self._cut(weight, index)
        self.version(check_finite=False)
        if self._parts is None or not self._parts[0].requires_grad:
            self._parts = self.rounded(weight).split(self.sizes)
        return self._parts[index]

    def whole(self) -> Tensor:
        """The vector, rounded; without a gradient."""
        return self.rounded(self.holder.weight.detach())

    def rounded(self, numbers: Tensor) -> Tensor:
        """The values rounded as they are used. Gradients ignore the rounding."""
        return _rounded(numbers, self.rounding)

    def stored(self, vector: Tensor) -> Tensor:
        """The vector as saved: exactly the values in use.

        Raises:
            FileFormatError: a value is not finite.
        """
        refuse_non_finite(self.name, vector)
        return vector.detach().to(self.rounding or torch.float32)

    def check_stored(self, vector: Tensor) -> Tensor:
        """Check a vector that a file holds for this adapter.

        Raises:
            FileFormatError: another length, a dtype that is not floating point, or a value that is not finite.
        """
        expected = self.holder.weight
        if vector.shape != expected.shape or not vector.is_floating_point():
            raise FileFormatError(
                f"Expected {expected.numel():,} floating point values in the adapter file, found {vector.dtype} of "
                f"shape {tuple(vector.shape)}. The file is damaged, or belongs to another config or base."
            )
        refuse_non_finite(self.name, vector)
        return vector.to(expected.dtype)

    def _cut(self, vector: Tensor, index: int) -> Tensor:
        return self.rounded(vector.narrow(0, self._starts[index], self.sizes[index]))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out caches, which a copy computes again."""
        return {**self.__dict__, "_version": None, "_parts": None}


class DeltaTable(RootTable):
    """One vector per adapter, of which every adapted parameter takes a part.

    State: ``<state_name>.<adapter>.weight [n]``, which is also what is saved. A subclass names ``state_name`` (with the
    method's prefix), and the class that holds the vectors if they are not trained themselves.
    """

    state_name: str
    holder_cls: type[TrainableTensor | PackedTensor] = TrainableTensor
    instead_of_lora = (
        "Use fold(model, folder), which writes a plain checkpoint with the change in its weights, or, for a magnitude "
        "mask, export_sparse_delta."
    )

    def __init__(self) -> None:
        super().__init__()
        self.add_module(self.state_name, nn.ModuleDict())
        self._adapters: dict[str, DeltaVector] = {}
        self.guard = PassGuard()
        self.hooks: list[RemovableHandle] = []
        self.probe: Override | None = None  # the first of the model's, which shows whether the base is sharded

    def __getitem__(self, adapter_name: str) -> DeltaVector:
        return self._adapters[adapter_name]

    @property
    def holders(self) -> MutableMapping[str, TrainableTensor | PackedTensor]:
        """The modules that hold the vectors, by adapter name. PEFT walks over them."""
        return getattr(self, self.state_name)  # type: ignore[no-any-return]

    @property
    def state(self) -> State:
        """Which adapters are active in the model, and whether they are disabled."""
        return tuple(self.active_adapters), self._disable_adapters

    def add(self, adapter_name: str, vector: Tensor, sizes: Sequence[int], rounding: torch.dtype | None = None) -> None:
        """Add an adapter.

        Args:
            vector: ``[n]``, its starting values.
            sizes: length of each part, in order; they add up to n.
            rounding: dtype to which every value is rounded before use, and in which it is saved; None: no rounding.
        """
        holder = self.holders[adapter_name] = self.holder_cls(vector)
        self._adapters[adapter_name] = DeltaVector(adapter_name, holder, sizes, rounding)

    def version(self, adapter_name: str) -> TensorVersion:
        """The version of an adapter's vector: the same object until the vector changes.

        Raises:
            FileFormatError: in eval mode, the vector has changed and a value is not finite.
        """
        return self._adapters[adapter_name].version(check_finite=not self.training)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter."""
        super().delete_adapter(adapter_name)
        self._adapters.pop(adapter_name, None)


class _Rounded(torch.autograd.Function):
    """Round to a dtype and back; the gradient ignores the rounding."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, dtype: torch.dtype) -> Tensor:
        return vector.to(dtype).to(vector.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _rounded(vector: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or dtype == vector.dtype:
        return vector
    rounded: Tensor = _Rounded.apply(vector, dtype)  # type: ignore[no-untyped-call]
    return rounded


def refuse_non_finite(adapter_name: str, numbers: Tensor) -> None:
    """Check that all values of an adapter are finite.

    Raises:
        FileFormatError: one is not.
    """
    if not numbers.is_meta and not numbers.isfinite().all():
        raise FileFormatError(
            f"Expected finite values in adapter '{adapter_name}', found NaN or infinity. Its training diverged (lower "
            "the learning rate, or go back to an earlier checkpoint), or its file is damaged."
        )
