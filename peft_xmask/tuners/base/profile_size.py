"""Measure the bytes of an adapter."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from ...core.adapter_folder import ProfileSize, folder_size, read_adapter_config
from ...errors import ConfigError
from ...pool import AdapterPool


def profile_size(source: nn.Module | str | Path, adapter_name: str = "default") -> ProfileSize:
    """Measure an adapter: a folder as it is on disk, or a PEFT model as it would be saved.

    Works for every PEFT method, not only ours.

    Args:
        source: an adapter folder, or a :class:`peft.PeftModel`.
        adapter_name: which adapter of a model.

    Raises:
        FileFormatError: the folder does not hold an adapter.
        ConfigError: the model has no adapter of that name.
    """
    if not isinstance(source, nn.Module):
        folder = Path(source)
        pool = read_adapter_config(folder).get("pool")
        return folder_size(folder, AdapterPool.from_pretrained(pool).nbytes if pool else 0)
    configs: dict[str, Any] = getattr(source, "peft_config", {})
    if adapter_name not in configs:
        raise ConfigError(f"Expected a PEFT model with adapter '{adapter_name}', found adapters {sorted(configs)}.")
    with tempfile.TemporaryDirectory() as saved:
        source.save_pretrained(saved, selected_adapters=[adapter_name])  # type: ignore[operator]
        return profile_size(Path(saved) / ("" if adapter_name == "default" else adapter_name))
