"""Other numbers in the place of a base parameter's own, which come back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...errors import BaseMismatchError


class Override:
    """Writes ``own + delta`` into a parameter, in some places or in all, and keeps ``own`` of those places alone.

    The sum is taken in float32 (or wider) and rounded once, to the parameter's dtype. What is written always starts
    from ``own``, so it does not depend on what was written before, and :meth:`restore` has no rounding error to undo.

    Somebody else's change to the places that are written is found before anything is written over it.

    Args:
        module: holds the parameter; the parameter itself is looked up at each use, since it may be replaced.
        name: of the parameter in the module.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = module
        self.name = name
        self._places: Tensor | None = None
        self._own: Tensor | None = None
        self._seen: tuple[int, int, Tensor] | None = None
        self._writes = 0

    @property
    def parameter(self) -> Tensor:
        """The parameter as it is now."""
        parameter = self.module._parameters.get(self.name)  # found much sooner than as an attribute
        return getattr(self.module, self.name) if parameter is None else parameter

    @property
    def edits(self) -> tuple[int, int]:
        """Which parameter it is, and how often others changed it (as torch counts: not through ``.data``)."""
        return id(self.parameter), self.parameter._version - self._writes

    @property
    def own(self) -> Tensor:
        """The parameter's own numbers; for a parameter that is written whole, if at all."""
        return self.parameter if self._own is None else self._own

    @property
    def written(self) -> bool:
        """Whether the parameter holds other numbers than its own."""
        return self._own is not None

    def write(self, places: Tensor | None, delta: Tensor) -> None:
        """Let the parameter be ``own + delta`` in these places and ``own`` elsewhere.

        In a graph that is being compiled nothing is checked: the graph does it each time it runs.

        Args:
            places: long, ``[n]``, different positions in the flat parameter; None: all of it.
            delta: floating point, ``[n]``, or of the parameter's shape.

        Raises:
            BaseMismatchError: somebody changed the parameter in the places that were written before.
        """
        with writing():
            if self._own is None or places is not self._places:
                self._restore()
            else:
                self._refuse_changes(thorough=False)
            own = self._get(places) if self._own is None else self._own
            self._replace(places, own, combined(own, delta))

    def holds(self, places: Tensor) -> bool:
        """Whether it is exactly these places that hold other numbers than the parameter's own."""
        return self._own is not None and self._places is places

    def check(self) -> None:
        """See that nobody changed the parameter, as far as torch counts changes.

        Raises:
            BaseMismatchError: somebody did, in the places that are written.
        """
        self._refuse_changes(thorough=False)

    def rewrite(self, own: Tensor, written: Tensor) -> None:
        """Let the places that are written already hold these numbers. Call it in :func:`writing`, after :meth:`check`.

        Args:
            own: equal to :attr:`own`, and kept in its place.
            written: ``own + delta``, of the parameter's dtype and on its device.
        """
        self._replace(self._places, own, written)

    def _replace(self, places: Tensor | None, own: Tensor, written: Tensor) -> None:
        evidence = _checksum(written) if places is None else written
        self._places, self._own, self._seen = places, own, (-1, 0, evidence)
        self._put(places, written)
        if not torch.compiler.is_compiling():
            parameter = self.parameter
            self._seen = (parameter._version, parameter.data_ptr(), evidence)

    def restore(self) -> None:
        """Give the parameter its own numbers back; nothing to do if it has them.

        Raises:
            BaseMismatchError: somebody changed the parameter in the places that were written.
        """
        if self._own is not None:
            with writing():
                self._restore()

    def _restore(self) -> None:
        if self._own is not None:
            self._refuse_changes(thorough=True)
            self._put(self._places, self._own)
            self.forget()

    def forget(self) -> None:
        """Take what the parameter holds for its own from now on."""
        self._places = self._own = self._seen = None

    def _get(self, places: Tensor | None) -> Tensor:
        parameter = self.parameter
        if places is None:
            return parameter.clone()
        return parameter.view(-1).index_select(0, places) if parameter.is_contiguous() else parameter.take(places)

    def _put(self, places: Tensor | None, numbers: Tensor) -> None:
        parameter, compiling = self.parameter, torch.compiler.is_compiling()
        before = 0 if compiling else parameter._version
        if places is None:
            parameter.copy_(numbers)
        elif parameter.is_contiguous():
            parameter.view(-1).index_copy_(0, places, numbers)
        else:
            parameter.put_(places, numbers)
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
            look = _checksum if self._places is None else _bits
            found, expected = look(self._get(self._places)), evidence if self._places is None else look(evidence)
            if torch.equal(found, expected) or torch.equal(found, look(self._own)):
                return
        raise BaseMismatchError(
            f"Expected in '{self.name}' of a {type(self.module).__name__} the numbers that the active adapter put "
            "there, found others: the base was changed while an adapter was active. The change was not written over, "
            "and the base's own numbers under it are not known any more: load the base again. To change a base on "
            "purpose, do it with its adapters disabled.",
            expected="the numbers of the active adapter",
            found="others",
        )


@contextmanager
def writing() -> Iterator[None]:
    """Without gradients; and what is kept can be used outside of inference mode too."""
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
    """As integers, which are equal where the bits are."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[numbers.element_size()]
    return numbers.contiguous().view(integers)


def _checksum(numbers: Tensor) -> Tensor:
    """Of the bits, for a parameter that is written whole: less to keep than a copy."""
    return _bits(numbers).sum(dtype=torch.int64)
