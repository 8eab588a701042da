"""A module with bottleneck adapters."""

from __future__ import annotations

from collections.abc import MutableMapping

from torch import Tensor, nn

from ...core.adapter import AdapterForm, AdapterPair
from ...core.sites import Site
from ..sites.layer import SiteLayer
from .config import BottleneckConfig

INIT_STD = 0.02


class BottleneckLayer(SiteLayer):
    """One linear module and its bottleneck adapters.

    State: ``bottleneck_adapter_down.<name>.weight [b, d_in]``, ``.bias [b]``; ``bottleneck_adapter_up.<name>.weight
    [d_out, b]``, ``.bias [d_out]``.
    """

    bottleneck_adapter_down: MutableMapping[str, nn.Linear]
    bottleneck_adapter_up: MutableMapping[str, nn.Linear]
    bottleneck_adapter_dropout: MutableMapping[str, nn.Dropout]
    adapter_layer_names = ("bottleneck_adapter_down", "bottleneck_adapter_up")
    other_param_names = ("bottleneck_adapter_dropout",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        for name in (*self.adapter_layer_names, *self.other_param_names):
            self.add_module(name, nn.ModuleDict())
        self._configs: dict[str, BottleneckConfig] = {}

    def add(self, adapter_name: str, config: BottleneckConfig, site: Site) -> None:
        """Create one adapter, on the base module's device."""
        down = nn.Linear(site.in_features, config.bottleneck_size, bias=config.use_bias)
        up = nn.Linear(config.bottleneck_size, site.out_features, bias=config.use_bias)
        nn.init.normal_(down.weight, std=INIT_STD)
        if config.init_weights:
            nn.init.zeros_(up.weight)
        else:
            nn.init.normal_(up.weight, std=INIT_STD)
        for projection in (down, up) if config.use_bias else ():
            nn.init.zeros_(projection.bias)
        self.bottleneck_adapter_down[adapter_name] = down
        self.bottleneck_adapter_up[adapter_name] = up
        self.bottleneck_adapter_dropout[adapter_name] = nn.Dropout(config.dropout)
        self._configs[adapter_name] = config
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def form(self, adapter_name: str) -> AdapterForm | None:
        """How the adapter is applied here; None if the adapter is not at this site."""
        config = self._configs.get(adapter_name)
        return config.form if config is not None and adapter_name in self.bottleneck_adapter_down else None

    def pair(self, adapter_name: str) -> AdapterPair:
        """The adapter's matrices, with the scale in the up-projection."""
        down, up = self.bottleneck_adapter_down[adapter_name], self.bottleneck_adapter_up[adapter_name]
        scale = self._configs[adapter_name].scale
        weight: Tensor = up.weight if scale == 1.0 else up.weight * scale
        bias = up.bias if scale == 1.0 or up.bias is None else up.bias * scale
        return AdapterPair(down.weight, weight, down.bias, bias)

    def dropout(self, adapter_name: str) -> float:
        """The configured dropout in training, else 0. It is held in a module, where trl finds it to switch it off."""
        module = self.bottleneck_adapter_dropout[adapter_name]
        return module.p if module.training else 0.0

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter."""
        super().delete_adapter(adapter_name)
        self._configs.pop(adapter_name, None)
