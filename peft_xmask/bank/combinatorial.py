"""Hard masks at the information bound: exactly k of N adapters as one number below C(N, k).

The masks of a profile, each a number r_i below ``C = C(N, k)``, make one number ``sum_i r_i C^i``, and that many bytes
as ``C^M - 1`` needs for M masks. The number of a mask that chooses ``c_1 < c_2 < ... < c_k`` (from 0) is
``C(c_1, 1) + C(c_2, 2) + ... + C(c_k, k)``, its place among all in colexicographic order. Where k is more than half of
N, the adapters that are *not* chosen are told.

50 of 400 at 12 sites: 641 bytes a profile against 1,200 as bits.

Source: the combinatorial number system (D. H. Lehmer); its use for masks is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import comb, lgamma, log
from operator import add

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.packing import pack_bits, packed_size, unpack_bits
from ..errors import MaskFormatError

_LARGEST_TABLE, _LARGEST_BYTES = 1 << 23, 1 << 27
_BLOCK = 4096  # masks that are decoded at once
_LIMB = 56
_BYTE_VALUES = 256 ** np.arange(_LIMB // 8, dtype=np.int64)


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
    rows = _rows(num_adapters, told)
    masks = unpack_bits(bits, num_adapters).flatten(1, 2)
    if told != top_k:
        masks = ~masks
    size = coded_size(masks.shape[1], num_adapters, top_k)
    coded = bytearray()
    for profile in masks.numpy():
        positions = np.nonzero(profile)[1].reshape(len(profile), told).tolist()
        number = 0
        for chosen in reversed(positions):
            number = number * total + sum(rows[c][j] for j, c in enumerate(chosen, 1))
        coded += number.to_bytes(size, "little")
    if not coded:
        return torch.empty(len(masks), size, dtype=torch.uint8)
    return torch.frombuffer(coded, dtype=torch.uint8).view(len(masks), size)


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
    parts = [torch.empty(0, 2, num_sites, packed_size(num_adapters), dtype=torch.uint8)]
    step = max(1, _BLOCK // (2 * num_sites))
    for start in range(0, len(coded), step):
        ranks = []
        for row, content in enumerate(coded[start : start + step].numpy(), start):
            number = int.from_bytes(content.tobytes(), "little")
            for _ in range(2 * num_sites):
                number, rank = divmod(number, total)
                ranks.append(rank)
            if number:
                raise MaskFormatError(
                    f"Expected coded masks of {top_k} of {num_adapters}, found none in profile {row}."
                )
        chosen = _chosen(ranks, num_adapters, told)
        masks = torch.from_numpy(chosen if told == top_k else ~chosen)
        parts.append(pack_bits(masks.view(-1, 2, num_sites, num_adapters)))
    return torch.cat(parts)


def _check_sizes(num_masks: int, num_adapters: int, top_k: int) -> None:
    """Refuse sizes at which the tables of this code would not fit: a file may say any."""
    known = num_masks >= 2 and 1 <= top_k <= num_adapters
    told = min(top_k, num_adapters - top_k)
    if (
        not known
        or max(num_masks, told) * num_adapters > _LARGEST_TABLE
        or (told + 1) * num_adapters * _estimated_size(1, num_adapters, top_k) > _LARGEST_BYTES
    ):
        raise MaskFormatError(
            f"Expected masks of a size for which they can be coded, found {num_masks} of {top_k} of {num_adapters}. "
            f"The product of N and k, or of N and the masks, is at most {_LARGEST_TABLE:,}, and that of N, k and the "
            f"bytes of a coded mask at most {_LARGEST_BYTES:,}."
        )


def _estimated_size(num_masks: int, num_adapters: int, top_k: int) -> float:
    """About :func:`coded_size`, without large numbers."""
    nats = lgamma(num_adapters + 1) - lgamma(top_k + 1) - lgamma(num_adapters - top_k + 1)
    return num_masks * nats / log(256)


def _chosen(ranks: Sequence[int], num_adapters: int, told: int) -> NDArray[np.bool_]:
    """The masks of these numbers, all at once. ``[M, N]``.

    From the last adapter down, one is chosen where ``C(c, j)`` still fits into the number, with j adapters to go.
    """
    limbs = _limbs(num_adapters, told)
    numbers = _as_limbs(ranks, limbs.shape[1])
    to_go = np.full(len(ranks), told)
    chosen = np.zeros((num_adapters, len(ranks)), dtype=np.bool_)
    for adapter in reversed(range(num_adapters)):
        rest = numbers - limbs[adapter].take(to_go, axis=1)
        for low in range(len(rest) - 1):
            rest[low + 1] += rest[low] >> _LIMB  # -1 if one was borrowed
            rest[low] &= (1 << _LIMB) - 1
        fits = rest[-1] >= 0
        numbers = np.where(fits, rest, numbers)
        chosen[adapter] = fits
        to_go -= fits
    return np.ascontiguousarray(chosen.T)


def _as_limbs(numbers: Sequence[int], count: int) -> NDArray[np.int64]:
    """Numbers in digits of 56 bits, the lowest first. ``[count, M]``."""
    content = b"".join(number.to_bytes(7 * count, "little") for number in numbers)
    digits: NDArray[np.int64] = np.frombuffer(content, dtype=np.uint8).reshape(-1, count, 7) @ _BYTE_VALUES
    return np.ascontiguousarray(digits.T)


@lru_cache(maxsize=8)
def _limbs(num_adapters: int, told: int) -> NDArray[np.int64]:
    """:func:`_rows` as :func:`_as_limbs`. ``[N, limbs, told + 1]``."""
    count = comb(num_adapters, told).bit_length() // _LIMB + 1
    return np.stack([_as_limbs(row, count) for row in _rows(num_adapters, told)])


@lru_cache(maxsize=8)
def _rows(num_adapters: int, told: int) -> tuple[tuple[int, ...], ...]:
    """``C(c, j)`` for c from 0 to N - 1 and j from 0 to ``told``."""
    rows = [(1, *[0] * told)]
    for _ in range(num_adapters - 1):
        rows.append((1, *map(add, rows[-1], rows[-1][1:])))
    return tuple(rows)
