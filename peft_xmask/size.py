"""How many bytes a profile takes, each kind on its own."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .errors import ConfigError, FileFormatError
from .files import read_tensors
from .pool import AdapterPool

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True)
class ProfileSize:
    """Bytes of one saved adapter.

    Attributes:
        payload_bytes: tensors of the method itself: for X-PEFT the masks and gains.
        head_bytes: tensors of modules that are trained and saved whole, such as a classification head.
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


def profile_size(source: nn.Module | str | Path, adapter_name: str = "default") -> ProfileSize:
    """Measure an adapter: a folder as it is on disk, or a PEFT model as it would be saved.

    Works for every PEFT method, not only ours.

    Args:
        source: an adapter folder, or a :class:`peft.PeftModel`.
        adapter_name: which adapter of a model.

    Raises:
        FileFormatError: the folder is not that of an adapter.
        ConfigError: the model has no adapter of that name.
    """
    if not isinstance(source, nn.Module):
        return folder_size(Path(source))
    configs: dict[str, Any] = getattr(source, "peft_config", {})
    if adapter_name not in configs:
        raise ConfigError(f"Expected a PEFT model with adapter '{adapter_name}', found adapters {sorted(configs)}.")
    with tempfile.TemporaryDirectory() as folder:
        source.save_pretrained(folder, selected_adapters=[adapter_name])  # type: ignore[operator]
        return folder_size(Path(folder) / ("" if adapter_name == "default" else adapter_name))


def is_head_key(key: str, modules_to_save: Iterable[str]) -> bool:
    """Whether a key of an adapter file belongs to a module that is saved whole."""
    return any(f".{module}." in f".{key}" for module in modules_to_save)


def folder_size(folder: Path, pool_bytes: int | None = None) -> ProfileSize:
    """Measure an adapter folder; the pool is loaded for it only if ``pool_bytes`` is None.

    Raises:
        FileFormatError: not the folder of an adapter.
    """
    config_path = folder / CONFIG_FILE
    if not config_path.is_file():
        raise FileFormatError(f"Expected an adapter folder with {CONFIG_FILE}, found none in '{folder}'.")
    config = json.loads(config_path.read_text(encoding="utf-8"))
    tensors, _ = read_tensors(folder / ADAPTER_FILE)
    saved_whole = config.get("modules_to_save") or ()
    head = sum(tensor.nbytes for key, tensor in tensors.items() if is_head_key(key, saved_whole))
    if pool_bytes is None:
        pool_bytes = AdapterPool.from_pretrained(config["pool"]).nbytes if config.get("pool") else 0
    return ProfileSize(
        payload_bytes=sum(tensor.nbytes for tensor in tensors.values()) - head,
        head_bytes=head,
        file_bytes=(folder / ADAPTER_FILE).stat().st_size,
        folder_bytes=sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        pool_bytes=pool_bytes,
        num_profiles=config.get("num_profiles") or 1,
    )
