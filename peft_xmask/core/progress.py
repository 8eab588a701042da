"""The progress bar of everything that takes a while."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm.auto import tqdm


class ProgressBar:
    """A bar on standard error with the rate and the time left; nothing where no terminal reads it.

    Use it as a context manager, or call :meth:`close`.

    Args:
        title: what is being done.
        total: steps; None: unknown.
        done: steps that were done before.
        shown: False hides the bar.
        unit: what a step is, for the rate.
    """

    def __init__(self, title: str, total: int | None, *, done: int = 0, shown: bool = True, unit: str = "step") -> None:
        hidden = not shown or not sys.stderr.isatty()
        self._bar = tqdm(
            desc=title, total=total, initial=done, disable=hidden, unit=unit, leave=False, dynamic_ncols=True
        )

    def move_to(self, done: int, facts: str = "") -> None:
        """Show how many steps are done, and a few words beside the bar."""
        self._bar.set_postfix_str(facts, refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()
