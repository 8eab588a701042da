"""State where PEFT, trl and FSDP look for it: tensors in modules, in a table at the root of a base model."""

from __future__ import annotations

import math
import mmap
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from .peft_private import BaseTunerLayer, check_adapters_to_merge


class TrainableTensor(nn.Module):
    """A trainable tensor."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class PackedTensor(nn.Module):
    """Bytes in a buffer, which no optimizer updates and no cast changes."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)


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


class RootTable(nn.Module, BaseTunerLayer):
    """The state of one model's adapters. It wraps no module but implements what PEFT expects of a layer."""

    in_features = out_features = None
    cast_input_dtype_enabled = True
    """What ``peft.helpers.disable_input_dtype_casting`` switches off in each layer; without effect here."""

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

    instead_of_lora: str
    """What to do instead of PEFT's ``convert_to_lora``."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Refuse: PEFT asks while it converts a model to a LoRA, layer by layer, and this table is none of its layers.

        Raises:
            ConfigError: says what to do instead.
        """
        raise ConfigError(
            f"PEFT's convert_to_lora cannot convert adapter '{adapter_name}', whose state is in one place for all "
            f"modules. {self.instead_of_lora}"
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Note which adapters the layers have merged."""
        self.merged_adapters.extend(check_adapters_to_merge(self, adapter_names))

    def unmerge(self) -> None:
        """Note that the layers have unmerged."""
        self.merged_adapters.clear()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Do nothing: layers move what they need to their own device."""
