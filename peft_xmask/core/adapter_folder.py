"""The folder of a saved adapter: its files, and the bytes of each part."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FileFormatError
from .files import read_tensors

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
NAMES_PREFIX = "profile_names."
"""Of tensors in the file of a bank that hold the names of its profiles."""


@dataclass(frozen=True)
class ProfileSize:
    """Bytes of one saved adapter.

    Attributes:
        payload_bytes: tensors of the method itself: for X-PEFT the masks and gains, without a bank's names.
        head_bytes: tensors of ``modules_to_save``, such as a classification head.
        file_bytes: the tensor file: payload, head and its header.
        folder_bytes: all files of the folder (config and model card too).
        pool_bytes: stored tensors of the shared pool; 0 for a random pool (it is a seed) and for methods without one.
        num_profiles: rows in the file; divide by it for bytes per profile.
    """

    payload_bytes: int
    head_bytes: int
    file_bytes: int
    folder_bytes: int
    pool_bytes: int = 0
    num_profiles: int = 1

    def amortised_bytes(self, profiles: int) -> float:
        """Payload per profile plus its share of the pool, when ``profiles`` profiles use the same pool."""
        return self.payload_bytes / self.num_profiles + self.pool_bytes / profiles


def is_head_key(key: str, modules_to_save: Iterable[str]) -> bool:
    """Whether a key of an adapter file belongs to one of ``modules_to_save``."""
    return any(f".{module}." in f".{key}" for module in modules_to_save)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Fields of an adapter folder's config file.

    Raises:
        FileFormatError: the folder has no such file.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileFormatError(f"Expected an adapter folder with {CONFIG_FILE}, found none in '{folder}'.")
    fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return fields


def folder_size(folder: Path, pool_bytes: int = 0) -> ProfileSize:
    """Measure an adapter folder.

    Args:
        folder: the adapter's folder.
        pool_bytes: bytes of the stored tensors of the adapter's pool, for the result.

    Raises:
        FileFormatError: the folder does not hold an adapter.
    """
    config = read_adapter_config(folder)
    tensors, _ = read_tensors(folder / ADAPTER_FILE)
    saved_whole = config.get("modules_to_save") or ()
    head = sum(tensor.nbytes for key, tensor in tensors.items() if is_head_key(key, saved_whole))
    return ProfileSize(
        payload_bytes=sum(tensor.nbytes for key, tensor in tensors.items() if not key.startswith(NAMES_PREFIX)) - head,
        head_bytes=head,
        file_bytes=(folder / ADAPTER_FILE).stat().st_size,
        folder_bytes=sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        pool_bytes=pool_bytes,
        num_profiles=config.get("num_profiles") or 1,
    )
