"""Temporary values in a base parameter. The original values are kept, and restored bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...core.fingerprint import in_zero3
from ...errors import BaseMismatchError, ConfigError


class Override:
    """Writes ``own + delta`` into elements of a parameter. Keeps ``own``, the original values, of those elements only.

    The sum is computed in float32 (or wider) and rounded once to the parameter's dtype. Every write starts from
    ``own``, so it does not depend on earlier writes, and :meth:`restore` has no rounding error to undo.

    If other code changes the written elements, the next write or restore detects it and raises an error.

    Args:
        module: the module with the parameter, which is looked up at each use because it may be replaced.
        name: the parameter's name in the module.
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
        parameter = self.module._parameters.get(self.name)  # much faster than getattr
        return getattr(self.module, self.name) if parameter is None else parameter

    @property
    def edits(self) -> tuple[int, int]:
        """The parameter's identity, and how often other code changed it (torch does not count changes to ``.data``)."""
        return id(self.parameter), self.parameter._version - self._writes

    @property
    def own(self) -> Tensor:
        """The original values of the written elements; the whole parameter if nothing, or everything, is written."""
        return self.parameter if self._own is None else self._own

    @property
    def written(self) -> bool:
        """Whether temporary values are in the parameter."""
        return self._own is not None

    def write(self, index: Tensor | None, delta: Tensor) -> None:
        """Make the parameter ``own + delta`` at ``index`` and ``own`` everywhere else.

        A graph being compiled checks nothing, because it writes each time it runs.

        Args:
            index: long, ``[n]``, distinct positions in the flattened parameter; None: all of it.
            delta: floating point, ``[n]``, or of the parameter's shape.

        Raises:
            BaseMismatchError: other code changed the elements written before.
            ConfigError: the parameter is sharded over processes.
        """
        self.refuse_sharded()
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
        """Check that no other code changed the written elements, as far as torch counts changes.

        Raises:
            BaseMismatchError: it did.
            ConfigError: the parameter is sharded over processes.
        """
        self.refuse_sharded()
        self._refuse_changes(thorough=False)

    def rewrite(self, own: Tensor, written: Tensor) -> None:
        """Replace the temporary values. Call it inside :func:`writing`, after :meth:`check`.

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
        """Restore the original values. Does nothing if they are there already.

        Raises:
            BaseMismatchError: other code changed the written elements.
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
        """Accept the parameter's current values as the original ones."""
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

    def refuse_sharded(self) -> None:
        """Check that this process has the whole parameter, and that what is written there stays there.

        Raises:
            ConfigError: the parameter is sharded over processes.
        """
        if not torch.compiler.is_compiling() and _is_sharded(self.parameter):
            raise sharded_error(self.name, self.module)

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
            "holds other values: the base was changed while an adapter was active. That change is still there, but "
            "the base's original values are lost: load the base again. To change a base on purpose, disable its "
            "adapters first.",
            expected="the values of the active adapter",
            found="other values",
        )


@contextmanager
def writing() -> Iterator[None]:
    """Disable gradients and inference mode: tensors kept here are also used outside of inference mode."""
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


def sharded_error(name: str, module: nn.Module) -> ConfigError:
    """The error for a parameter that is sharded over processes."""
    return ConfigError(
        f"Expected whole parameters, found '{name}' of a {type(module).__name__} sharded over processes (FSDP, or "
        "DeepSpeed's ZeRO-3). Magnitude masks and weight adapters write into the base's parameters, so they cannot "
        "work there. Use DDP, ZeRO-2, or an adapter that reads activations (XPEFTConfig, BottleneckConfig)."
    )


def _is_sharded(parameter: Tensor) -> bool:
    """Whether a process holds a part of a parameter only, or, in a forward pass, a view of what it gathered.

    One process alone has the whole of it, also inside FSDP1. ZeRO-3 empties parameters even there.
    """
    distributed = torch.distributed
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if type(parameter) is nn.Parameter:  # asked at every write: DTensors, FSDP2's parameters, are of another type
        return in_zero3(parameter) or (several and hasattr(parameter, "_fsdp_flattened"))  # the latter: FSDP1
    return hasattr(parameter, "full_tensor") or (several and parameter._is_view())


def _bits(numbers: Tensor) -> Tensor:
    """The bits as integers: equal where, and only where, the bits are equal."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[numbers.element_size()]
    return numbers.contiguous().view(integers)


def _checksum(numbers: Tensor) -> Tensor:
    """A checksum of the bits, for a parameter that is written completely: smaller than a copy."""
    return _bits(numbers).sum(dtype=torch.int64)
