"""Masks as bytes, as they are stored in a profile file.

Layout. A hard mask over N adapters is ceil(N / 8) bytes; adapter i is bit ``i % 8`` (least significant first) of byte
``i // 8``; the unused high bits of the last byte are zero. A half-precision number is its two IEEE 754 bytes, low byte
first. Everything stored is uint8, so casting a model to another dtype cannot change it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import MaskFormatError

_BYTE_WEIGHTS = (1, 2, 4, 8, 16, 32, 64, 128)


def packed_size(num_adapters: int) -> int:
    """Bytes of one hard mask over ``num_adapters`` adapters: ceil(N / 8)."""
    return (num_adapters + 7) // 8


def pack_bits(selected: Tensor) -> Tensor:
    """Pack booleans into bytes.

    Args:
        selected: bool, shape ``[..., N]``.

    Returns:
        uint8, shape ``[..., ceil(N / 8)]``.
    """
    *batch, num_adapters = selected.shape
    padded = torch.nn.functional.pad(selected.to(torch.uint8), (0, -num_adapters % 8))
    weights = torch.tensor(_BYTE_WEIGHTS, dtype=torch.uint8, device=selected.device)
    return (padded.view(*batch, packed_size(num_adapters), 8) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, num_adapters: int) -> Tensor:
    """Inverse of :func:`pack_bits`.

    Args:
        bits: uint8, shape ``[..., ceil(N / 8)]``.
        num_adapters: N.

    Returns:
        bool, shape ``[..., N]``.
    """
    weights = torch.tensor(_BYTE_WEIGHTS, dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(-1) & weights).ne(0).flatten(-2)[..., :num_adapters]


def check_bits(bits: Tensor, num_adapters: int, top_k: int) -> None:
    """Check that every mask selects exactly ``top_k`` of ``num_adapters``.

    Args:
        bits: uint8, shape ``[..., ceil(N / 8)]``.

    Raises:
        MaskFormatError: wrong dtype or width, a padding bit that is set, or a row with another number of ones.
    """
    width = packed_size(num_adapters)
    if bits.dtype != torch.uint8 or bits.shape[-1] != width:
        raise MaskFormatError(
            f"Expected masks as uint8 of width {width} (for {num_adapters} adapters), found {bits.dtype} of shape "
            f"{tuple(bits.shape)}. The file is damaged or belongs to a pool of another size."
        )
    ones = unpack_bits(bits, width * 8)
    padding = ones[..., num_adapters:]
    if padding.any():
        raise MaskFormatError(
            f"Expected the {padding.shape[-1]} bits after adapter {num_adapters - 1} to be zero, found ones. "
            "The file is damaged or belongs to a pool of another size."
        )
    counts = ones.sum(-1)
    wrong = counts != top_k
    if wrong.any():
        where = wrong.nonzero()[0].tolist()
        raise MaskFormatError(
            f"Expected exactly top_k={top_k} of {num_adapters} adapters in every mask, found "
            f"{int(counts[tuple(where)])} at index {where} ({int(wrong.sum())} masks are wrong). "
            "The file is damaged or was written with another top_k."
        )


def pack_halves(values: Tensor) -> Tensor:
    """Round to IEEE half precision and return the bytes.

    Args:
        values: floating point, shape ``[..., M]``.

    Returns:
        uint8, shape ``[..., 2 * M]``.
    """
    return values.detach().to(torch.float16).contiguous().view(torch.uint8)


def unpack_halves(data: Tensor) -> Tensor:
    """Inverse of :func:`pack_halves`.

    Args:
        data: uint8, shape ``[..., 2 * M]``.

    Returns:
        float32, shape ``[..., M]``.
    """
    return data.contiguous().view(torch.float16).to(torch.float32)
