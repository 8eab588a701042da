"""Banks that belong together, written as one."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from .names import NameIndex
from .rows import BankRows
from .storage import BITS, GAIN_BITS, write_bank


def write_merged(banks: Sequence[BankRows], folder: Path) -> None:
    """Write banks as one, their masks a few megabytes at a time.

    Raises:
        ConfigError: a name in two of them.
        LockedError: another process is writing there.
    """
    first = banks[0]
    index = first.name_index() if len(banks) == 1 else NameIndex.build(name for bank in banks for name in bank)
    config = copy.copy(first.config)
    config.num_profiles = len(index)
    config.inference_mode = True
    parts: Mapping[str, tuple[tuple[int, ...], Iterable[Tensor]]] = {
        BITS: ((len(index), *first.spec.bits_shape[1:]), (block for bank in banks for block in bank.blocks()))
    }
    if first.spec.learn_gain:
        gains = (block for bank in banks for block in bank.blocks(gains=True))
        parts = {**parts, GAIN_BITS: ((len(index), *first.spec.gain_shape[1:]), gains)}
    write_bank(folder, config, index, parts, first.shared)
