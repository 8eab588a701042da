"""Open a bank in a folder, frozen or live, for prediction."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..bank.bank import ProfileBank
from ..bank.live import LiveBank
from ..bank.storage import LIVE_FILE
from .live import LivePredictor
from .predictor import Predictor


def open_predictor(
    bank: Path,
    live: Path | None = None,
    base: str | os.PathLike[str] | None = None,
    *,
    device: str | None = None,
    cache_bytes: int = 0,
) -> tuple[Predictor, Path | None]:
    """A predictor, and the folder to watch for new versions of the bank (None: nothing to watch).

    Args:
        bank: folder of a bank, frozen or live.
        live: folder of a live bank whose people are served. Where it holds none yet, one is made of ``bank``.
        base: see :class:`~peft_xmask.people.predictor.Predictor`.
        device: see there.
        cache_bytes: see there; of no use for a live bank.

    Raises:
        ConfigError, FileFormatError: there is no bank, or it is damaged.
    """
    options: dict[str, Any] = {"device": device}
    if live is None and (bank / LIVE_FILE).is_file():
        live = bank
    if live is None:
        return Predictor.from_pretrained(bank, base, cache_bytes=cache_bytes, **options), bank
    make_live(bank, live)
    return LivePredictor.open(live, base, **options), None


def make_live(bank: Path, live: Path | None) -> None:
    """Make a live bank of a bank, unless there is one or none is wanted.

    Raises:
        ConfigError, FileFormatError: there is no bank, or it is damaged.
    """
    if live is not None and not (live / LIVE_FILE).is_file():
        LiveBank.create(live, ProfileBank.from_pretrained(bank)).close()
