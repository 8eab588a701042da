"""Which tensor a module holds, and how often it has been changed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..base.steps import count_steps, steps_taken


class TensorVersion:
    """The tensor that a module holds as ``.weight``, at the version it had when this object was made.

    torch counts in-place changes of a tensor, except those made through ``.data`` and those of fused optimizers. Of a
    tensor that is trained, every step of any optimizer therefore counts as a change.

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
        self._steps = None
        if weight.requires_grad:
            count_steps()
            self._steps = steps_taken()

    def is_current(self) -> bool:
        """Whether the module still holds that tensor at that version. Every layer asks in every forward pass."""
        weight = self._weight
        return (
            self._tensors.get("weight") is weight
            and weight.data_ptr() == self._pointer
            and (self._version is None or weight._version == self._version)
            and (self._steps is None or self._steps == steps_taken())
        )


class TensorVersions(TensorVersion):
    """Versions of several tensors, the first of which is kept by name."""

    def __init__(self, first: TensorVersion, others: Sequence[TensorVersion]) -> None:
        self.first = first
        self._all = (first, *others)

    def is_current(self) -> bool:
        """Whether all of them are."""
        return all(version.is_current() for version in self._all)


Served = tuple[tuple[str, TensorVersion], ...]
"""Adapters by name, with the version of their numbers."""


class ParameterState:
    """What the parameters of a layer hold at the moment.

    Not a module: setting an attribute of one takes as long as everything else in switching a layer.

    Attributes:
        served: the adapters whose changes are in the parameters.
        stale: whether the next forward pass has to check more than the versions of these.
    """

    __slots__ = ("served", "stale")

    def __init__(self) -> None:
        self.served: Served = ()
        self.stale = True

    def is_current(self) -> bool:
        """Whether the next forward pass can use the parameters as they are."""
        if self.stale:
            return False
        for _, version in self.served:  # noqa: SIM110  (a generator takes longer, here in every layer and pass)
            if not version.is_current():
                return False
        return True
