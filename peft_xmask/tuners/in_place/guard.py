"""Threads that share one model whose parameters hold its adapters.

A layer's parameters must not be written while a thread is inside the layer. And which adapters are active belongs to
the model, not to a thread: a thread that expects others than those that another thread has set is told so.
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
    """What a thread has done to the model, and in which pass it is.

    Attributes:
        switches, toggles: changes of its own.
        state: of the model that it asked for last; None: it has asked for none.
        foreign_then: changes by others before it did.
        foreign: changes by others before the pass that it is in.
        named: whether it has named the adapters of its passes (``adapter_names``).
    """

    switches: int = 0
    toggles: int = 0
    state: State | None = None
    foreign_then: tuple[int, int] = (0, 0)
    foreign: tuple[int, int] = (0, 0)
    named: bool = False


class PassGuard:
    """One for all layers of a model.

    Attributes:
        condition: its lock is held to look at parameters or to write them, never during a pass.
        changing_state: held while the state of all layers is changed, so that they never get half of two states.
    """

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.changing_state = threading.RLock()
        self._switches = self._toggles = 0
        self._local = threading.local()

    def note_switch(self) -> None:
        """This thread is about to set active adapters."""
        with self.condition:
            self._switches += 1
            self._mine.switches += 1

    def note_toggle(self) -> None:
        """This thread is about to enable, disable, delete, merge or unmerge adapters."""
        with self.condition:
            self._toggles += 1
            self._mine.toggles += 1

    def note_state(self, state: State) -> None:
        """This thread has asked for this state of the model."""
        mine = self._mine
        mine.state, mine.foreign_then = state, self._foreign(mine)

    @contextmanager
    def names_given(self) -> Iterator[None]:
        """Passes of this thread, inside, name their adapters: which ones are active does not matter to them."""
        mine = self._mine
        before, mine.named = mine.named, True
        try:
            yield
        finally:
            mine.named = before

    def begin_pass(self, state: Callable[[], State]) -> None:
        """A forward pass of the model begins in this thread, once no other thread is changing the model's state.

        Args:
            state: gives that of the model.

        Raises:
            ConcurrencyError: another thread has changed the state that this one asked for.
        """
        mine = self._mine
        with self.changing_state:
            now, mine.foreign = state(), self._foreign(mine)
        asked = mine.state if mine.foreign != mine.foreign_then else None  # None: nobody else changed it
        if asked is not None and asked != now and not mine.named:
            raise ConcurrencyError(
                f"This thread asked for {_words(asked)}, and another thread has asked for {_words(now)} since. "
                f"Active adapters belong to the model. {_ADVICE}"
            )

    def end_pass(self) -> None:
        """A forward pass of the model ends in this thread.

        Raises:
            ConcurrencyError: another thread has set, disabled or merged adapters meanwhile.
        """
        mine = self._mine
        now = self._foreign(mine)
        if now[1] != mine.foreign[1] or (now != mine.foreign and not mine.named):
            raise ConcurrencyError(
                "Another thread set, disabled, merged or deleted adapters during this forward pass, so that its output "
                f"may be of several adapters. It is thrown away. {_ADVICE}"
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
        """A copy of the model has a guard of its own."""
        return PassGuard, ()


_ADVICE = (
    "Threads that want different adapters pass adapter_names to each call (one name for each example); or hold a lock "
    "from set_adapter to the end of the call."
)


def _words(state: State) -> str:
    names, disabled = state
    return "disabled adapters" if disabled else f"the active adapters {list(names)}"


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
