"""Counters that the processes of a server share."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from pathlib import Path

from ..core.files import write_text


class SharedCounts:
    """Counters of several processes: each writes its own into a folder, and each can read the sum.

    Counters of a worker that died still count.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"{os.getpid()}.json"
        self.written = Counter[str]()

    def write(self, counts: Counter[str]) -> None:
        """Let the others see this process's counters."""
        if counts != self.written:
            self.written = Counter(counts)
            write_text(self.path, json.dumps(counts))

    def total(self, counts: Counter[str]) -> Counter[str]:
        """The sum over all processes, with the current counters of this one."""
        found = Counter(counts)
        for path in self.path.parent.glob("*.json"):
            if path != self.path:
                with contextlib.suppress(OSError, ValueError):
                    found.update(json.loads(path.read_text(encoding="utf-8")))
        return found
