"""Several processes that serve one bank on one port, each with its own model. What they know of people is on disk."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .counts import SharedCounts
from .engine import Engine, ServerSettings
from .open import open_predictor

VARIABLE = "PEFT_XMASK_SERVER"
"""Environment variable that tells a worker what to serve."""


@dataclass(frozen=True)
class Serving:
    """What a server serves.

    Attributes:
        bank: folder of a bank, frozen or live.
        settings: of each worker.
        live: folder of a live bank whose people are served; None: the bank is served as it is.
        base: see :class:`~peft_xmask.people.predictor.Predictor`.
        threads: of PyTorch in each worker; None: its default.
        counts: folder in which workers share their counters; None: there is one worker.
    """

    bank: str
    settings: ServerSettings
    live: str | None = None
    base: str | None = None
    threads: int | None = None
    counts: str | None = None

    def engine(self) -> Engine:
        """Load the model and the bank. A live bank that does not exist yet is made."""
        import torch

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        live = None if self.live is None else Path(self.live)
        cache = self.settings.cache_bytes
        predictor, watched = open_predictor(Path(self.bank), live, self.base, device=device, cache_bytes=cache)
        shared = None if self.counts is None else SharedCounts(Path(self.counts))
        return Engine(predictor, self.settings, watched, shared)

    def to_json(self) -> str:
        """For :data:`VARIABLE`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Serving:
        """What :meth:`to_json` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "settings": ServerSettings(**fields["settings"])})


def app() -> Any:
    """The application of one worker."""
    from .server import create_app

    return create_app(Serving.from_json(os.environ[VARIABLE]).engine())


@contextlib.contextmanager
def environment(serving: Serving) -> Iterator[None]:
    """Tell workers that are started in this block what to serve."""
    with tempfile.TemporaryDirectory(prefix="peft-xmask-") as folder:
        fields = {**serving.__dict__, "counts": folder}
        os.environ[VARIABLE] = Serving(**fields).to_json()
        try:
            yield
        finally:
            del os.environ[VARIABLE]
