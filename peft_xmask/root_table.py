"""A table at the root of a base model, which PEFT visits as it visits the layers that wrap modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ._peft import BaseTunerLayer, check_adapters_to_merge


class RootTable(nn.Module, BaseTunerLayer):
    """State of the adapters of one model in one place. It wraps no module, and answers what PEFT asks of a layer."""

    in_features = out_features = None

    def __init__(self) -> None:
        super().__init__()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    @property
    def weight(self) -> None:  # type: ignore[override]
        """None: the table wraps no module."""
        return None

    @property
    def bias(self) -> None:  # type: ignore[override]
        """None: the table wraps no module."""
        return None

    def forward(self, x: Any) -> Any:
        """Pass on what a root that runs its children one after another (``nn.Sequential``) hands to each of them."""
        return x

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Note which adapters the layers have merged."""
        self.merged_adapters.extend(check_adapters_to_merge(self, adapter_names))

    def unmerge(self) -> None:
        """Note that the layers have unmerged."""
        self.merged_adapters.clear()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Nothing to follow: layers move what they need to where they are."""
