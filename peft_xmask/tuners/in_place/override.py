"""Other numbers in a base parameter, with the parameter's own numbers kept so that they come back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...errors import BaseMismatchError


class Override:
    """Writes ``own + delta`` into elements of a parameter and keeps ``own`` of those elements, and of no others.

    The sum is taken in float32 (or wider) and rounded once, to the parameter's dtype. Every write starts from ``own``,
    so it does not depend on earlier writes, and :meth:`restore` has no rounding error to undo.

    If somebody else changes the written elements, the next write or restore finds out and refuses.

    Args:
        module: holds the parameter. The parameter itself is looked up at each use, since it may be replaced.
        name: of the parameter in the module.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = module
        self.name = name
        self._index: Tensor | None = None
        self._own: Tensor | None = None
        self._seen: tuple[int, int, Tensor] | None = None
        self._writes = 0

    @property
    def parameter(self) -> Tensor:
        """The parameter as it is now."""
        parameter = self.module._parameters.get(self.name)  # much faster than as an attribute
        return getattr(self.module, self.name) if parameter is None else parameter

    @property
    def edits(self) -> tuple[int, int]:
        """Identity of the parameter, and how often others changed it (as torch counts: not through ``.data``)."""
        return id(self.parameter), self.parameter._version - self._writes

    @property
    def own(self) -> Tensor:
        """The own numbers of the written elements; the whole parameter if nothing, or everything, is written."""
        return self.parameter if self._own is None else self._own

    @property
    def written(self) -> bool:
        """Whether the parameter holds other numbers than its own."""
        return self._own is not None

    def write(self, index: Tensor | None, delta: Tensor) -> None:
        """Make the parameter ``own + delta`` at ``index`` and ``own`` everywhere else.

        In a graph that is being compiled nothing is checked: the graph writes each time it runs.

        Args:
            index: long, ``[n]``, distinct positions in the flattened parameter; None: all of it.
            delta: floating point, ``[n]``, or of the parameter's shape.

        Raises:
            BaseMismatchError: somebody changed the elements that were written before.
        """
        with writing():
            if self._own is None or index is not self._index:
                self._restore()
            else:
                self._refuse_changes(thorough=False)
            own = self._get(index) if self._own is None else self._own
            self._replace(index, own, combined(own, delta))

    def holds(self, index: Tensor) -> bool:
        """Whether exactly the elements at ``index`` (this very tensor) are written."""
        return self._own is not None and self._index is index

    def check(self) -> None:
        """Refuse to go on if somebody changed the written elements, as far as torch counts changes.

        Raises:
            BaseMismatchError: somebody did.
        """
        self._refuse_changes(thorough=False)

    def rewrite(self, own: Tensor, written: Tensor) -> None:
        """Put other numbers into the elements that are written. Call it inside :func:`writing`, after :meth:`check`.

        Args:
            own: equal to :attr:`own`, which it replaces.
            written: ``own + delta``, of the parameter's dtype and on its device.
        """
        self._replace(self._index, own, written)

    def _replace(self, index: Tensor | None, own: Tensor, written: Tensor) -> None:
        evidence = _checksum(written) if index is None else written
        self._index, self._own, self._seen = index, own, (-1, 0, evidence)
        self._put(index, written)
        if not torch.compiler.is_compiling():
            parameter = self.parameter
            self._seen = (parameter._version, parameter.data_ptr(), evidence)

    def restore(self) -> None:
        """Give the parameter its own numbers back. Does nothing if it has them.

        Raises:
            BaseMismatchError: somebody changed the written elements.
        """
        if self._own is not None:
            with writing():
                self._restore()

    def _restore(self) -> None:
        if self._own is not None:
            self._refuse_changes(thorough=True)
            self._put(self._index, self._own)
            self.forget()

    def forget(self) -> None:
        """Take what the parameter holds now as its own numbers."""
        self._index = self._own = self._seen = None

    def _get(self, index: Tensor | None) -> Tensor:
        parameter = self.parameter
        if index is None:
            return parameter.clone()
        return parameter.view(-1).index_select(0, index) if parameter.is_contiguous() else parameter.take(index)

    def _put(self, index: Tensor | None, numbers: Tensor) -> None:
        parameter, compiling = self.parameter, torch.compiler.is_compiling()
        before = 0 if compiling else parameter._version
        if index is None:
            parameter.copy_(numbers)
        elif parameter.is_contiguous():
            parameter.view(-1).index_copy_(0, index, numbers)
        else:
            parameter.put_(index, numbers)
        self._writes += 0 if compiling else parameter._version - before

    def _refuse_changes(self, *, thorough: bool) -> None:
        if torch.compiler.is_compiling():
            return
        parameter = self.parameter
        assert self._own is not None
        assert self._seen is not None
        version, pointer, evidence = self._seen
        if not thorough and (parameter._version, parameter.data_ptr()) == (version, pointer):
            return
        if parameter.dtype == self._own.dtype:
            look = _checksum if self._index is None else _bits
            found, expected = look(self._get(self._index)), evidence if self._index is None else look(evidence)
            if torch.equal(found, expected) or torch.equal(found, look(self._own)):
                return
        raise BaseMismatchError(
            f"Expected '{self.name}' of a {type(self.module).__name__} to hold what the active adapter wrote, but it "
            "holds other numbers: the base was changed while an adapter was active. That change is still there, but "
            "the base's own numbers are lost: load the base again. To change a base on purpose, disable its adapters "
            "first.",
            expected="the numbers of the active adapter",
            found="others",
        )


@contextmanager
def writing() -> Iterator[None]:
    """No gradients, and no inference tensors either: what is kept here is used outside of inference mode too."""
    if torch.compiler.is_compiling():
        with torch.no_grad():
            yield
    else:
        with torch.inference_mode(False), torch.no_grad():
            yield


def combined(own: Tensor, delta: Tensor) -> Tensor:
    """``own + delta``, added in float32 or wider and rounded once, to the dtype of ``own``."""
    wide = torch.promote_types(torch.promote_types(own.dtype, delta.dtype), torch.float32)
    return (own.to(wide) + delta.to(own.device, wide).view(own.shape)).to(own.dtype)


def _bits(numbers: Tensor) -> Tensor:
    """The bits as integers, which are equal exactly where the bits are."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[numbers.element_size()]
    return numbers.contiguous().view(integers)


def _checksum(numbers: Tensor) -> Tensor:
    """Of the bits, for a parameter that is written whole: smaller than a copy."""
    return _bits(numbers).sum(dtype=torch.int64)
