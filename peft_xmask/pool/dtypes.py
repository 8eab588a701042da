"""Storage dtypes of a pool."""

from __future__ import annotations

import torch

from ..errors import ConfigError

STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def require_storage_dtype(dtype: object) -> torch.dtype:
    """Refuse a dtype that pools are not stored in.

    Raises:
        ConfigError: not float32, bfloat16 or float16.
    """
    if not isinstance(dtype, torch.dtype) or dtype not in STORAGE_DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not possible. Expected torch.float32, torch.bfloat16 or torch.float16.")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` as ``"float32"``."""
    return str(dtype).removeprefix("torch.")
