"""Zeros that take memory only where they are written to."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

_WORTH_IT = 1 << 20  # bytes below which a mapping of its own is a waste


def lazy_zeros(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """Zeros whose pages the system gives on the first write, a few kilobytes at a time.

    On the CPU of a system with anonymous mappings; elsewhere, and for small tensors, they are ordinary zeros.
    """
    size = math.prod(shape) * dtype.itemsize
    wanted = torch.get_default_device() if device is None else device
    if wanted.type != "cpu" or size < _WORTH_IT or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(*shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # a huge page would be 2 MB for one row
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(*shape)
