"""Similar profiles: those whose masks differ in few bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError
from ..tuners.base.config import require_positive
from .rows import BankRows

_BLOCK = 1 << 18  # bytes of rows to compare at once: they fit into a core's cache


class Neighbour(NamedTuple):
    """A profile, and the number of bits in which its masks differ from another profile's.

    Every mask chooses exactly k adapters, so half of that number is how many choices differ.
    """

    name: str
    distance: int


def similar(bank: BankRows, name: str, count: int) -> list[Neighbour]:
    """The profiles nearest to one, without itself; see :meth:`~peft_xmask.profiles.ProfileBank.similar`."""
    profile = bank[name]
    require_positive("count", count)
    if bank.spec.mask_type != "hard":
        raise ConfigError("Expected a bank of hard masks, found soft masks, which have no bits to compare.")
    wanted = as_rows(profile.bits.unsqueeze(0))[0]
    distances = _joined(differing_bits(as_rows(block), wanted) for block in bank.blocks())
    found = (Neighbour(bank.name_at(place), int(distances[place])) for place in _smallest(distances, count + 1))
    return [neighbour for neighbour in found if neighbour.name != name][:count]


def differing_bits(rows: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.int32]:
    """The number of bits in which rows differ from one other row, or each from its own.

    Apart from the result, memory does not depend on the number of rows.

    Shapes: ``rows [R, W]``, ``others [W]`` or ``[R, W]``; returns ``[R]``.
    """
    count, width = rows.shape
    words = max(1, -(-width // 8))
    step = min(max(1, _BLOCK // (8 * words)), max(1, count))
    padded = np.zeros((step, words), dtype=np.uint64)
    found, ones = np.empty(count, dtype=np.int32), np.ones(words, dtype=np.float32)
    for start in range(0, count, step):
        some = rows[start : start + step]
        other = others if others.ndim == 1 else others[start : start + step]
        np.bitwise_xor(some, other, out=padded.view(np.uint8)[: len(some), :width])
        found[start : start + step] = np.bitwise_count(padded[: len(some)]).astype(np.float32) @ ones
    return found


def as_rows(bits: Tensor) -> NDArray[np.uint8]:
    """Masks ``[P, ...]`` as bytes ``[P, W]``; nothing is copied."""
    rows: NDArray[np.uint8] = bits.flatten(1).numpy()
    return rows


def _joined(parts: Iterable[NDArray[np.int32]]) -> NDArray[np.int32]:
    return np.concatenate([np.empty(0, dtype=np.int32), *parts])


def _smallest(distances: NDArray[np.int32], count: int) -> list[int]:
    """Places of the smallest distances, in ascending order; ties in the order of their places."""
    places = np.arange(len(distances))
    if count < len(distances):
        places = np.flatnonzero(distances <= np.partition(distances, count - 1)[count - 1])
    found: list[int] = places[np.argsort(distances[places], kind="stable")][:count].tolist()
    return found
