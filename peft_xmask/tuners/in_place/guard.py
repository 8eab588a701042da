"""Threads that share one model: who may write into its parameters, and when."""

from __future__ import annotations

import threading
from typing import Any


class PassGuard:
    """One lock for all layers of a model. It is held while parameters are looked at or written, never during a pass."""

    def __init__(self) -> None:
        self.condition = threading.Condition()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model has a guard of its own."""
        return PassGuard, ()


class LayerUse:
    """The threads that are inside one layer's forward pass. Its parameters must not be written meanwhile.

    Threads that want the same adapters run side by side. A thread that wants others waits until the layer is free.

    Args:
        guard: of the model.
    """

    __slots__ = ("_threads", "guard")

    def __init__(self, guard: PassGuard) -> None:
        self.guard = guard
        self._threads: list[int] = []

    @property
    def by_others(self) -> bool:
        """Whether a thread other than this one is inside. Call it with the guard's lock held."""
        threads = self._threads
        return bool(threads) and any(each != threading.get_ident() for each in threads)

    def enter(self) -> None:
        """This thread goes inside. Call it with the guard's lock held."""
        self._threads.append(threading.get_ident())

    def leave(self) -> None:
        """This thread comes out again."""
        with self.guard.condition:
            self._threads.remove(threading.get_ident())
            if not self._threads:
                self.guard.condition.notify_all()

    def wait(self) -> None:
        """Wait until no other thread is inside. Call it with the guard's lock held; it is released meanwhile."""
        while self.by_others:
            self.guard.condition.wait()

    def __reduce__(self) -> tuple[Any, ...]:
        """Nobody is inside a copy."""
        return LayerUse, (self.guard,)
