"""Banks that belong together, written as one."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from torch import Tensor

from .names import NameIndex
from .rows import BankRows
from .storage import write_bank


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
    rows: dict[str, tuple[tuple[int, ...], Iterable[Tensor]]] = {
        key: ((len(index), *first.row_shape(key)), chain.from_iterable([bank.blocks(key) for bank in banks]))
        for key in first.row_keys()
    }
    write_bank(folder, config, index, rows, first.shared)
