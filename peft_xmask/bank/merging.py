"""Write several banks as one."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError
from ..tuners.base.config import require_choice
from .names import NameIndex
from .rows import BankRows
from .storage import write_bank

PREFERENCES = ("first", "last")


def without_twins(banks: Sequence[BankRows], prefer: str | None) -> list[BankRows]:
    """Banks in which each name comes once. Names are compared by their hashes, eight bytes each.

    Args:
        prefer: whose profile is kept where several banks have one of a name: ``"first"`` or ``"last"``.

    Raises:
        ConfigError: a name in two of them and no preference, or an unknown preference.
    """
    if prefer is not None:
        require_choice("prefer", prefer, PREFERENCES)
    indexes = [bank.name_index() for bank in banks]
    hashes, counts = np.unique(
        np.concatenate([index.tensors["hashes"].numpy() for index in indexes]), return_counts=True
    )
    common = hashes[counts > 1]
    order = list(range(len(banks)))
    seen: dict[str, int] = {}
    kept = dict(enumerate(banks))
    for number in reversed(order) if prefer == "last" else order:
        twins = [name for name in _names(indexes[number], common) if seen.setdefault(name, number) != number]
        if twins and prefer is None:
            more = f" (and {len(twins) - 1:,} more)" if len(twins) > 1 else ""
            places = " and ".join(
                banks[each].place or f"bank {each + 1} of {len(banks)}" for each in (seen[twins[0]], number)
            )
            raise ConfigError(
                f"The profile {twins[0]!r}{more} is in both {places}. "
                "Rename or remove one, or say whose is kept: prefer='first' or 'last' (--prefer)."
            )
        if twins:
            kept[number] = banks[number].without(twins)
    return list(kept.values())


def _names(index: NameIndex, hashes: NDArray[np.int64]) -> list[str]:
    """Names with one of these hashes, in the order of their rows."""
    chosen = np.isin(index.tensors["hashes"].numpy(), hashes)
    return [index.name(row) for row in sorted(index.tensors["rows"].numpy()[chosen].tolist())]


def write_merged(banks: Sequence[BankRows], folder: Path) -> None:
    """Write banks as one, their rows a few megabytes at a time.

    Raises:
        ConfigError: a name in two of them.
        LockedError: another process is writing there.
    """
    first = banks[0]
    index = first.name_index() if len(banks) == 1 else NameIndex.build(name for bank in banks for name in bank)
    config = copy.copy(first.config)
    config.num_profiles = len(index)
    config.inference_mode = True
    rows: dict[str, tuple[tuple[int, ...], Iterable[Tensor]]] = {
        key: ((len(index), *first.row_shape(key)), chain.from_iterable([bank.blocks(key) for bank in banks]))
        for key in first.row_keys()
    }
    write_bank(folder, config, index, rows, first.shared)
