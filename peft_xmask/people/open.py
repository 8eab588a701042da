"""The predictor of a bank in a folder, frozen or live."""

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
    """A predictor of a bank, and the folder to watch for new versions of it; None: there is none to watch.

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
    if (live / LIVE_FILE).is_file():
        return LivePredictor.open(live, base, **options), None
    made = LiveBank.create(live, ProfileBank.from_pretrained(bank))
    return LivePredictor(made, base, **options), None
