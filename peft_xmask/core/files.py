"""Writing files so that an interrupted write leaves the old one whole, and reading tensors without trusting them."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import ConfigError, FileFormatError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` with a temporary path beside ``path``, flush it to disk, then rename it over ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    beside = Path(name)
    try:
        write(beside)
        with beside.open("rb") as stream:
            os.fsync(stream.fileno())
        mode = 0o666 & ~_umask()
        beside.chmod(mode)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda beside: _write_text(beside, text))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically. Tensors are made contiguous; the format marker ``pt`` is always set.

    Raises:
        OSError: it cannot be written, as on a full disk.
    """
    ready = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    notes = {"format": "pt", **(metadata or {})}
    write_atomically(path, lambda beside: _save(ready, beside, notes))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors and its metadata.

    Raises:
        FileFormatError: missing, truncated, oversized or otherwise not a safetensors file.
    """
    if not path.is_file():
        raise FileFormatError(f"Expected a safetensors file at '{path}', found none. Check the path.")
    try:
        with safetensors.safe_open(str(path), framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
        return load_file(str(path), device="cpu"), metadata
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise FileFormatError(
            f"'{path}' ({path.stat().st_size} bytes) is not a readable safetensors file: {error}. "
            "It may be truncated or damaged; fetch or write it again."
        ) from error


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    hasher = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def dtype_from_name(name: str) -> torch.dtype:
    """``"float32"``, ``"bfloat16"`` or ``"float16"`` as a torch dtype.

    Raises:
        FileFormatError: any other name.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise FileFormatError(f"Expected a storage dtype among {sorted(known)}, found {name!r}.")
    return known[name]


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, str(path), metadata=metadata)
    except safetensors.SafetensorError as error:  # it says in words only what the system said
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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
