"""What the adapters of one model add to its parameters: one vector each, at the model's root."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import FileFormatError
from ..base.state import PackedTensor, RootTable, TrainableTensor


class Stamp:
    """A tensor as it was: which one, and in which state (as torch counts changes: not through ``.data``).

    Args:
        holder: a module with a ``.weight``, parameter or buffer.
    """

    def __init__(self, holder: nn.Module) -> None:
        self._tensors = holder._parameters if "weight" in holder._parameters else holder._buffers
        weight = self._tensors["weight"]
        assert weight is not None
        self._weight = weight
        self._version = None if weight.is_inference() else weight._version
        self._pointer = weight.data_ptr()

    def holds(self) -> bool:
        """Whether it is still the same tensor in the same state. Asked in every layer and pass."""
        weight = self._weight
        return (
            self._tensors.get("weight") is weight
            and weight.data_ptr() == self._pointer
            and (self._version is None or weight._version == self._version)
        )


class Line:
    """What the parameters of a layer hold: of which adapters, and whether that has to be looked at again.

    No module: to set an attribute of one takes as long as the rest of switching a layer.

    Attributes:
        served: adapters and their stamps.
        stale: whether to look again.
    """

    __slots__ = ("served", "stale")

    def __init__(self) -> None:
        self.served: tuple[tuple[str, Stamp], ...] = ()
        self.stale = True

    def holds(self) -> bool:
        """Whether all that is served is still what it was."""
        for _, stamp in self.served:  # noqa: SIM110  (a generator takes longer, here in every layer and pass)
            if not stamp.holds():
                return False
        return True


class DeltaTable(RootTable):
    """One vector per adapter, of which every adapted parameter takes a part.

    State: ``<state_name>.<adapter>.weight [n]``, which is also what is saved. A subclass names ``state_name`` (with the
    method's prefix), and what holds the vectors if they are not trained themselves.
    """

    state_name: str
    holder_cls: type[TrainableTensor | PackedTensor] = TrainableTensor

    def __init__(self) -> None:
        super().__init__()
        self.add_module(self.state_name, nn.ModuleDict())
        self._sizes: dict[str, tuple[int, ...]] = {}
        self._starts: dict[str, tuple[int, ...]] = {}
        self._rounding: dict[str, torch.dtype | None] = {}
        self._stamps: dict[str, Stamp] = {}
        self._parts: dict[str, tuple[Tensor, ...]] = {}

    @property
    def vectors(self) -> MutableMapping[str, TrainableTensor | PackedTensor]:
        """The vectors by adapter name."""
        return getattr(self, self.state_name)  # type: ignore[no-any-return]

    def add(self, adapter_name: str, vector: Tensor, sizes: Sequence[int], rounding: torch.dtype | None = None) -> None:
        """Enter an adapter.

        Args:
            vector: ``[n]``, where it starts.
            sizes: numbers that each part takes, in order; they add up to n.
            rounding: dtype that every number is rounded to where it is used, and saved in; None: none.
        """
        self.vectors[adapter_name] = self.holder_cls(vector)
        self._sizes[adapter_name] = tuple(sizes)
        self._starts[adapter_name] = (0, *accumulate(sizes))
        self._rounding[adapter_name] = rounding

    def stamp(self, adapter_name: str) -> Stamp:
        """What tells whether the adapter's vector is still what it was: the same object as long as it is.

        Raises:
            FileFormatError: in eval mode, a number that is not finite.
        """
        stamp = self._stamps.get(adapter_name)
        if stamp is None or not stamp.holds():
            holder = self.vectors[adapter_name]
            if not self.training:
                _check_finite(adapter_name, holder.weight)
            stamp = self._stamps[adapter_name] = Stamp(holder)
            self._parts.pop(adapter_name, None)
        return stamp

    def part(self, adapter_name: str, index: int) -> Tensor:
        """One part of an adapter's vector, rounded; with a gradient where the vector has one."""
        weight = self.vectors[adapter_name].weight
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return self._cut(adapter_name, weight.detach(), index)
        if torch.compiler.is_compiling():
            return self._cut(adapter_name, weight, index)
        self.stamp(adapter_name)
        parts = self._parts.get(adapter_name)
        if parts is None or not parts[0].requires_grad:
            rounded = _rounded(weight, self._rounding[adapter_name])
            parts = self._parts[adapter_name] = rounded.split(self._sizes[adapter_name])
        return parts[index]

    def _cut(self, adapter_name: str, vector: Tensor, index: int) -> Tensor:
        part = vector.narrow(0, self._starts[adapter_name][index], self._sizes[adapter_name][index])
        return _rounded(part, self._rounding[adapter_name])

    def sizes(self, adapter_name: str) -> tuple[int, ...]:
        """Numbers that each part of an adapter's vector takes."""
        return self._sizes[adapter_name]

    def whole(self, adapter_name: str) -> Tensor:
        """An adapter's vector, rounded; without a gradient."""
        return _rounded(self.vectors[adapter_name].weight.detach(), self._rounding[adapter_name])

    def rounded(self, adapter_name: str, numbers: Tensor) -> Tensor:
        """Numbers as the adapter's are where they are used; the gradient passes as if they were not rounded."""
        return _rounded(numbers, self._rounding[adapter_name])

    def cast(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Hold an adapter's vector in another dtype."""
        self.vectors[adapter_name].to(dtype)

    def stored(self, adapter_name: str, vector: Tensor) -> Tensor:
        """The adapter's vector as it is saved: exactly the numbers that are used.

        Raises:
            FileFormatError: a number is not finite.
        """
        _check_finite(adapter_name, vector)
        return vector.detach().to(self._rounding[adapter_name] or torch.float32)

    def check_stored(self, adapter_name: str, vector: Tensor) -> Tensor:
        """What a file holds, for the adapter's vector.

        Raises:
            FileFormatError: another length, a dtype that is not floating point, or a number that is not finite.
        """
        expected = self.vectors[adapter_name].weight
        if vector.shape != expected.shape or not vector.is_floating_point():
            raise FileFormatError(
                f"Expected {expected.numel():,} floating point values in the adapter file, found {vector.dtype} of "
                f"shape {tuple(vector.shape)}. The file is damaged, or belongs to another config or base."
            )
        _check_finite(adapter_name, vector)
        return vector.to(expected.dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter."""
        super().delete_adapter(adapter_name)
        for notes in (self._sizes, self._starts, self._rounding, self._stamps, self._parts):
            notes.pop(adapter_name, None)  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        """Without what a copy computes anew."""
        return {**self.__dict__, "_stamps": {}, "_parts": {}}


class _Rounded(torch.autograd.Function):
    """Rounded to a dtype and back; the gradient passes as if it were not."""

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


def _check_finite(adapter_name: str, vector: Tensor) -> None:
    if not vector.is_meta and not vector.isfinite().all():
        raise FileFormatError(
            f"Expected finite values in adapter '{adapter_name}', found NaN or infinity. Its training diverged (lower "
            "the learning rate, or go back to an earlier checkpoint), or its file is damaged."
        )
