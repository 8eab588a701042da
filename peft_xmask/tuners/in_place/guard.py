"""Guards for threads that share one model whose parameters hold its adapters.

A layer's parameters must not be written while a thread is inside the layer. The active adapters belong to the model,
not to a thread: if another thread has changed them, a thread that expects the old ones gets an error.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...errors import ConcurrencyError

State = tuple[tuple[str, ...], bool]
"""Names of the active adapters, and whether they are disabled."""


@dataclass
class _OfThread:
    """What one thread has done to the model.

    Attributes:
        switches, toggles: how often this thread changed the active adapters, or enabled, deleted or merged adapters.
        state: the state of the model that it asked for last; None: it never asked for one.
        foreign_then: the number of changes by other threads when it asked.
        foreign: the number of changes by other threads when its current pass began.
        named: whether its passes name their adapters (``adapter_names``).
    """

    switches: int = 0
    toggles: int = 0
    state: State | None = None
    foreign_then: tuple[int, int] = (0, 0)
    foreign: tuple[int, int] = (0, 0)
    named: bool = False


class PassGuard:
    """Detects threads that change each other's adapters. All layers of a model share one guard.

    Attributes:
        condition: its lock is held while parameters are compared or written, never during a forward pass.
        changing_state: held while all layers change their state, so that no pass sees a mixture of two states.
    """

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.changing_state = threading.RLock()
        self._switches = self._toggles = 0
        self._local = threading.local()

    def note_switch(self) -> None:
        """Call before setting active adapters."""
        with self.condition:
            self._switches += 1
            self._mine.switches += 1

    def note_toggle(self) -> None:
        """Call before enabling, disabling, deleting, merging or unmerging adapters."""
        with self.condition:
            self._toggles += 1
            self._mine.toggles += 1

    def note_state(self, state: State) -> None:
        """Record the state of the model that this thread asked for."""
        mine = self._mine
        mine.state, mine.foreign_then = state, self._foreign(mine)

    @contextmanager
    def names_given(self) -> Iterator[None]:
        """Within this context, passes of this thread name their adapters, and the active ones do not matter."""
        mine = self._mine
        before, mine.named = mine.named, True
        try:
            yield
        finally:
            mine.named = before

    def begin_pass(self, state: Callable[[], State]) -> None:
        """Call at the start of a forward pass. Waits while another thread is changing the model's state.

        Args:
            state: returns the model's current state.

        Raises:
            ConcurrencyError: another thread has changed the state that this thread asked for.
        """
        mine = self._mine
        with self.changing_state:
            now, mine.foreign = state(), self._foreign(mine)
        asked = mine.state if mine.foreign != mine.foreign_then else None  # None: no other thread changed it
        if asked is not None and asked != now and not mine.named:
            raise ConcurrencyError(
                f"This thread asked for {_words(asked)}, and another thread has asked for {_words(now)} since. "
                f"Active adapters belong to the model. {_ADVICE}"
            )

    def end_pass(self) -> None:
        """Call at the end of a forward pass.

        Raises:
            ConcurrencyError: another thread set, disabled or merged adapters during the pass.
        """
        mine = self._mine
        now = self._foreign(mine)
        if now[1] != mine.foreign[1] or (now != mine.foreign and not mine.named):
            raise ConcurrencyError(
                "Another thread set, disabled, merged or deleted adapters during this forward pass. Its output may mix "
                f"several adapters and was discarded. {_ADVICE}"
            )

    def _foreign(self, mine: _OfThread) -> tuple[int, int]:
        with self.condition:
            return self._switches - mine.switches, self._toggles - mine.toggles

    @property
    def _mine(self) -> _OfThread:
        found: _OfThread | None = getattr(self._local, "found", None)
        if found is None:
            found = self._local.found = _OfThread()
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model gets a new guard."""
        return PassGuard, ()


_ADVICE = (
    "If threads need different adapters, pass adapter_names to each call (one name per example), or hold a lock from "
    "set_adapter to the end of the call."
)


def _words(state: State) -> str:
    names, disabled = state
    return "disabled adapters" if disabled else f"the active adapters {list(names)}"


class LayerUse:
    """The threads inside one layer's forward pass, during which its parameters must not be written.

    Threads that need the same adapters run side by side. A thread that needs others waits until the layer is free.

    Args:
        guard: the model's guard.
    """

    __slots__ = ("_threads", "guard")

    def __init__(self, guard: PassGuard) -> None:
        self.guard = guard
        self._threads: list[int] = []

    @property
    def by_others(self) -> bool:
        """Whether another thread is inside. The caller holds the guard's lock."""
        threads = self._threads
        return bool(threads) and any(each != threading.get_ident() for each in threads)

    def enter(self) -> None:
        """Register this thread as inside. The caller holds the guard's lock."""
        self._threads.append(threading.get_ident())

    def leave(self) -> None:
        """Unregister this thread."""
        with self.guard.condition:
            self._threads.remove(threading.get_ident())
            if not self._threads:
                self.guard.condition.notify_all()

    def wait(self) -> None:
        """Wait until no other thread is inside. The caller holds the guard's lock, which is released while waiting."""
        while self.by_others:
            self.guard.condition.wait()

    def __reduce__(self) -> tuple[Any, ...]:
        """No thread is inside a copy."""
        return LayerUse, (self.guard,)
