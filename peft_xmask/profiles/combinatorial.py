"""Hard masks at the information bound: exactly k of N adapters as one number below C(N, k).

The masks of a profile, each a number r_i below ``C = C(N, k)``, make one number ``sum_i r_i C^i``, and that many bytes
as ``C^M - 1`` needs for M masks. The number of a mask that chooses ``c_1 < c_2 < ... < c_k`` (from 0) is
``C(c_1, 1) + C(c_2, 2) + ... + C(c_k, k)``, its place among all in colexicographic order. Where k is more than half of
N, the adapters that are *not* chosen are told.

50 of 400 at 12 sites: 641 bytes a profile against 1,200 as bits.

Source: the combinatorial number system (D. H. Lehmer); its use for masks is ours.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from math import comb, lgamma, log

import numpy as np
import torch
from torch import Tensor

from ..errors import MaskFormatError
from ..packing import pack_bits, unpack_bits

_LARGEST_TABLE = 1 << 23


def coded_size(num_masks: int, num_adapters: int, top_k: int) -> int:
    """Bytes of a profile with this many masks: ``ceil(log2(C(N, k)^M) / 8)``."""
    largest: int = comb(num_adapters, top_k) ** num_masks - 1
    return (largest.bit_length() + 7) // 8


def encode(bits: Tensor, num_adapters: int, top_k: int) -> Tensor:
    """Code masks that are known to choose exactly ``top_k`` of ``num_adapters``.

    Args:
        bits: uint8 ``[P, 2, S, ceil(N / 8)]``.

    Returns:
        uint8 ``[P, coded_size(2 * S, N, k)]``.

    Raises:
        MaskFormatError: sizes that are too large to be computed with.
    """
    _check_sizes(2 * bits.shape[2], num_adapters, top_k)
    total, told = comb(num_adapters, top_k), min(top_k, num_adapters - top_k)
    columns = _columns(num_adapters, told)
    masks = unpack_bits(bits, num_adapters).flatten(1, 2)
    if told != top_k:
        masks = ~masks
    size = coded_size(masks.shape[1], num_adapters, top_k)
    rows = bytearray()
    for profile in masks.numpy():
        positions = np.nonzero(profile)[1].reshape(len(profile), told).tolist()
        number = 0
        for chosen in reversed(positions):
            number = number * total + sum(column[c] for column, c in zip(columns, chosen, strict=True))
        rows += number.to_bytes(size, "little")
    if not rows:
        return torch.empty(len(masks), size, dtype=torch.uint8)
    return torch.frombuffer(rows, dtype=torch.uint8).view(len(masks), size)


def decode(coded: Tensor, num_sites: int, num_adapters: int, top_k: int) -> Tensor:
    """Inverse of :func:`encode`.

    Args:
        coded: uint8 ``[P, coded_size(2 * S, N, k)]``.

    Returns:
        uint8 ``[P, 2, S, ceil(N / 8)]``.

    Raises:
        MaskFormatError: another width, or bytes that code no masks.
    """
    _check_sizes(2 * num_sites, num_adapters, top_k)
    size: float = _estimated_size(2 * num_sites, num_adapters, top_k)
    if coded.dim() != 2 or coded.shape[1] > 0.99 * size - 8:  # else the number is too large to be computed for nothing
        size = coded_size(2 * num_sites, num_adapters, top_k)
    if coded.dtype != torch.uint8 or coded.dim() != 2 or coded.shape[1] != size:
        raise MaskFormatError(
            f"Expected coded masks as uint8 of width {size:.0f} ({top_k} of {num_adapters} at {num_sites} sites), "
            f"found {coded.dtype} of shape {tuple(coded.shape)}."
        )
    total, told = comb(num_adapters, top_k), min(top_k, num_adapters - top_k)
    columns = _columns(num_adapters, told)
    chosen = np.zeros((len(coded), 2 * num_sites, num_adapters), dtype=np.bool_)
    for row, (profile, content) in enumerate(zip(chosen, coded.numpy(), strict=True)):
        number = int.from_bytes(content.tobytes(), "little")
        for mask in profile:
            number, rank = divmod(number, total)
            mask[_positions(columns, rank)] = True
        if number:
            raise MaskFormatError(f"Expected coded masks of {top_k} of {num_adapters}, found none in profile {row}.")
    masks = torch.from_numpy(chosen if told == top_k else ~chosen)
    return pack_bits(masks.view(len(coded), 2, num_sites, num_adapters))


def _check_sizes(num_masks: int, num_adapters: int, top_k: int) -> None:
    """Refuse sizes at which the tables of this code would not fit: a file may say any."""
    known = num_masks >= 2 and 1 <= top_k <= num_adapters
    if not known or max(num_masks, min(top_k, num_adapters - top_k)) * num_adapters > _LARGEST_TABLE:
        raise MaskFormatError(
            f"Expected masks of a size for which they can be coded, found {num_masks} of {top_k} of {num_adapters}. "
            f"The product of N and k, or of N and the masks, is at most {_LARGEST_TABLE:,}."
        )


def _estimated_size(num_masks: int, num_adapters: int, top_k: int) -> float:
    """About :func:`coded_size`, without large numbers."""
    nats = lgamma(num_adapters + 1) - lgamma(top_k + 1) - lgamma(num_adapters - top_k + 1)
    return num_masks * nats / log(256)


def _positions(columns: Sequence[Sequence[int]], rank: int) -> list[int]:
    """The adapters that the mask of this number chooses: at each step the last one that fits."""
    found = []
    for column in reversed(columns):
        at = bisect_right(column, rank) - 1
        rank -= column[at]
        found.append(at)
    return found


@lru_cache(maxsize=8)
def _columns(num_adapters: int, told: int) -> tuple[tuple[int, ...], ...]:
    """``C(c, j)`` for j from 1 to ``told`` and c from 0 to N - 1; never falling in c."""
    return tuple(tuple(comb(c, j) for c in range(num_adapters)) for j in range(1, told + 1))
