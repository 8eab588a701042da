"""A pool that is saved beside the profiles that use it, so that their folder needs nothing but the base.

Its folder is called ``pool-`` and its fingerprint; a config in the folder above names it ``./pool-...``.
Another pool has another name, so a writer that is killed, or finds the disk full, leaves the old one as it was.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from .pool import AdapterPool

PATTERN = "pool-*/*"
"""Files of such pools, as the Hub's clients take patterns."""

_NAME = re.compile(r"pool-[0-9a-f]{16}")


def save_beside(pool: AdapterPool, folder: Path) -> AdapterPool:
    """Save a pool beside profiles and open it there."""
    place = folder / f"pool-{pool.fingerprint}"
    if not place.exists():
        _put(place, pool.save_pretrained)
    return AdapterPool.from_pretrained(place)


def carried(pool: Any, folder: Path) -> Any:
    """What a config in ``folder`` calls a pool; one that stands beside other profiles is copied first.

    Args:
        pool: as a config has it: None, a folder or Hub id.
        folder: where the config is written.
    """
    if not isinstance(pool, str) or not _NAME.fullmatch(Path(pool).name) or not Path(pool).is_dir():
        return pool
    place = folder / Path(pool).name
    if not place.exists():
        _put(place, lambda copy: shutil.copytree(pool, copy))
    return f"./{place.name}"


def located(pool: Any, folder: str | os.PathLike[str]) -> Any:
    """Where a pool is that a config in ``folder`` names; other names stay as they are."""
    if isinstance(pool, str) and pool.startswith("./") and _NAME.fullmatch(pool[2:]):
        return os.path.join(folder, pool[2:])
    return pool


def _put(place: Path, write: Any) -> None:
    """Write a folder under another name first, so that it is there whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    half = place.with_name(f".{place.name}.{os.getpid()}")
    shutil.rmtree(half, ignore_errors=True)
    try:
        write(half)
        try:
            half.rename(place)
        except OSError:
            if not place.is_dir():  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(half, ignore_errors=True)
