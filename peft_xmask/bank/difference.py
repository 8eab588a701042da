"""The difference between two banks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from .bank import ProfileBank
from .compatibility import same_tensors
from .similar import as_rows, differing_bits
from .storage import in_blocks

FIELDS = (
    "base_model_name_or_path", "base_fingerprint", "pool_fingerprint", "num_adapters", "bottleneck_size", "mask_type",
    "top_k", "mask_weighting", "scale", "learn_gain", "activation", "layer_norm", "insertion_form",
)  # fmt: skip
"""Settings to compare."""


class Change(NamedTuple):
    """A profile that differs between two banks.

    Attributes:
        name: of the profile.
        bits: number of mask bits that differ.
        gains: number of gains that differ.
        offsets: number of offsets that differ.
    """

    name: str
    bits: int
    gains: int
    offsets: int = 0


@dataclass(frozen=True)
class Difference:
    """The difference between an old and a new bank. Their order of profiles does not matter.

    Attributes:
        added: names that only the new bank has.
        removed: names that only the old bank has.
        changed: profiles that differ, in the order of the new bank.
        unchanged: number of profiles that are the same.
        settings: config fields that differ, with the old and the new value.
        same_shared: whether both banks share the same head.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[Change, ...]
    unchanged: int
    settings: dict[str, tuple[Any, Any]]
    same_shared: bool

    def __bool__(self) -> bool:
        """Whether the banks differ."""
        return bool(self.added or self.removed or self.changed or self.settings or not self.same_shared)


def compare_banks(old: ProfileBank, new: ProfileBank) -> Difference:
    """Compare two banks by the names of their profiles.

    Raises:
        ConfigError: their rows are of different sizes, or only one has gains or offsets.
    """
    sizes = [{key: bank.row_shape(key) for key in bank.row_keys()} for bank in (old, new)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"Expected banks whose masks, gains and offsets are of one size, found {old!r} with rows of {sizes[0]} and "
            f"{new!r} with rows of {sizes[1]}. They cannot be compared bit by bit."
        )
    places = {name: place for place, name in enumerate(old)}
    pairs, names, added = [], [], []
    for place, name in enumerate(new):
        other = places.pop(name, None)
        if other is None:
            added.append(name)
        else:
            pairs.append((other, place))
            names.append(name)
    changed = _changes(old, new, names, torch.tensor(pairs, dtype=torch.long).view(-1, 2))
    settings = {
        field: (getattr(old.config, field), getattr(new.config, field))
        for field in FIELDS
        if getattr(old.config, field) != getattr(new.config, field)
    }
    same = same_tensors(old.shared, new.shared)
    return Difference(tuple(added), tuple(places), changed, len(names) - len(changed), settings, same)


def _changes(old: ProfileBank, new: ProfileBank, names: list[str], pairs: Tensor) -> tuple[Change, ...]:
    """Profiles that differ. Shapes: ``pairs [C, 2]``, the row of each name in the old and the new bank."""
    before, after = old.content(), new.content()
    bits = _differing(before.bits, after.bits, pairs)
    gains, offsets = (
        np.zeros_like(bits) if one is None or other is None else _differing(one, other, pairs, whole=True)
        for one, other in ((before.gain_bits, after.gain_bits), (before.offset_bits, after.offset_bits))
    )
    rows = np.flatnonzero(bits + gains + offsets)
    return tuple(Change(names[row], int(bits[row]), int(gains[row]), int(offsets[row])) for row in rows.tolist())


def _differing(old: Tensor, new: Tensor, pairs: Tensor, whole: bool = False) -> Any:
    """Number of bits, or with ``whole`` of half-precision numbers, that differ in each pair of rows. Long ``[C]``."""
    parts = [np.empty(0, dtype=np.int64)]
    for first, second in zip(in_blocks(old, pairs[:, 0]), in_blocks(new, pairs[:, 1]), strict=True):
        one, other = as_rows(first), as_rows(second)
        found = (one.view("<u2") != other.view("<u2")).sum(-1) if whole else differing_bits(one, other)
        parts.append(found.astype(np.int64))
    return np.concatenate(parts)
