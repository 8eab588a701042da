"""Batches whose examples use different adapters, named in ``adapter_names``.

The names belong to one call of a model in one thread. Hooks that stay on the modules hand them on, so nothing about a
call is written into the model.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...errors import ConfigError
from .layer import TargetLayer


@dataclass(frozen=True, eq=False)
class _Call:
    model: MixedBatches
    names: list[str]
    beams: int


class _OfThread(threading.local):
    def __init__(self) -> None:  # run in each thread; a graph is guarded by which attributes there are
        self.call: _Call | None = None


_OF_THREAD = _OfThread()


class MixedBatches:
    """Hands ``adapter_names`` to the modules of one model that use them."""

    def __init__(self) -> None:
        self._hooked = False
        self._of_root: RemovableHandle | None = None

    def forget_modules(self) -> None:
        """Look for modules again at the next call with names: the model has others now."""
        self._hooked = False

    def leave(self) -> None:
        """Take the hook from the root, which remains when its adapted modules are gone."""
        if self._of_root is not None:
            self._of_root.remove()
        self._of_root, self._hooked = None, False

    @contextmanager
    def call(
        self, root: nn.Module, modules: Iterable[nn.Module], names: list[str] | None, beams: int
    ) -> Iterator[None]:
        """Serve these names until the context ends, in this thread alone.

        Args:
            root: whose inputs must have an example for each name.
            modules: that take an argument ``adapter_names``.
            names: of an adapter or ``"__base__"``, one for each prompt; None: no names.
            beams: examples for each prompt.
        """
        if names is not None and not self._hooked:
            if self._of_root is None:
                self._of_root = root.register_forward_pre_hook(_CheckBatch(self), with_kwargs=True)
            for module in modules:
                _hook(module, _PassNames(self))
            self._hooked = True
        before = _OF_THREAD.call
        _OF_THREAD.call = None if names is None else _Call(self, names, beams)
        try:
            yield
        finally:
            _OF_THREAD.call = before


class _Hook:
    def __init__(self, model: MixedBatches) -> None:
        self.model = model

    def call(self) -> _Call | None:
        call = _OF_THREAD.call
        return call if call is not None and call.model is self.model else None


class _PassNames(_Hook):
    """Adds ``adapter_names`` to a module's arguments, one name for each row of its input.

    A decoder has a row for each beam, an encoder one for each prompt. Some models (OPT) give a module all tokens of the
    batch as one matrix.
    """

    def __call__(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = self.call()
        if call is None:
            return None
        names = call.names
        x = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
        if x is not None and x.dim() > 0 and x.shape[0] % len(names) == 0:
            times = x.shape[0] // len(names)
            if times == call.beams or x.dim() == 2:
                names = [name for name in names for _ in range(times)]
        return args, {**kwargs, "adapter_names": names}


class _CheckBatch(_Hook):
    """Refuses names that are not one for each example of the batch."""

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self.call()
        if call is None:
            return
        sizes = [x.shape[0] for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() > 0]
        if sizes and not any(size == len(call.names) * call.beams for size in sizes):
            raise ConfigError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(call.names)} and {sizes[0] // call.beams} respectively."
            )


def _hook(module: nn.Module, hook: Any) -> None:
    """Register a forward pre-hook, unless the module has one of its class."""
    slow_path = module.slow_path if isinstance(module, TargetLayer) else None
    if slow_path is not None:
        if not slow_path.has_hook(type(hook)):
            slow_path.add_hook(hook)
    elif not any(isinstance(each, type(hook)) for each in module._forward_pre_hooks.values()):
        module.register_forward_pre_hook(hook, with_kwargs=True)


def examples_by_name(names: list[str], x: Tensor) -> Iterator[tuple[str, list[int]]]:
    """Each name and the examples that use it, in the order in which names first occur.

    Raises:
        ValueError: ``x`` has another number of rows than there are names.
    """
    if len(names) != x.shape[0]:
        raise ValueError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got {len(names)} and "
            f"{x.shape[0]} respectively."
        )
    examples: dict[str, list[int]] = {}
    for example, name in enumerate(names):
        examples.setdefault(name, []).append(example)
    yield from examples.items()
