"""The tuner of the bottleneck adapter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from ...core.sites import Site
from ...errors import ConfigError, FileFormatError
from ..base.config import require_choice
from ..base.peft_private import register
from ..sites.config import SiteConfig
from ..sites.layer import SiteLayer
from ..sites.tuner import SiteTuner
from .config import BottleneckConfig
from .layer import BottleneckLayer


class BottleneckModel(SiteTuner):
    """Puts a bottleneck adapter on every site of a model. Made by ``get_peft_model(model, BottleneckConfig(...))``."""

    prefix = "bottleneck_adapter_"
    tuner_layer_cls = BottleneckLayer
    layer_cls = BottleneckLayer

    def _prepare_sites(self, config: SiteConfig, model: nn.Module, sites: list[Site]) -> dict[str, Site]:
        return {site.name: site for site in sites}

    def _add_to_layer(self, layer: SiteLayer, config: SiteConfig, adapter_name: str, part: Site) -> None:
        assert isinstance(layer, BottleneckLayer)
        assert isinstance(config, BottleneckConfig)
        layer.add(adapter_name, config, part)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "cat"
    ) -> None:
        """Add an adapter whose output is a weighted sum of others' outputs: ``sum_i w_i adapter_i(y)``.

        Their bottlenecks are put side by side, as PEFT does with LoRAs under ``"cat"``. An activation works on each
        number alone, so this is exact with any activation. The new adapter is as wide as all of them together.

        Args:
            adapters: names of adapters.
            weights: one for each.
            adapter_name: of the new adapter; it is not set active.
            combination_type: ``"cat"``.

        Raises:
            ConfigError: names or weights are invalid, the adapters differ in activation, insertion form or targets,
                they have a LayerNorm, or another combination was asked for.
        """
        self._check_combination(adapters, weights, adapter_name)
        require_choice("combination_type", combination_type, ("cat",))
        configs: list[Any] = [self.peft_config[name] for name in adapters]
        layers = {name: m for name, m in self.model.named_modules() if isinstance(m, BottleneckLayer)}
        places = [{name for name, layer in layers.items() if layer.form(each) is not None} for each in adapters]
        first = configs[0]
        for name, config, found in zip(adapters, configs, places, strict=True):
            if config.form != first.form or found != places[0] or config.form.layer_norm:
                raise ConfigError(
                    "Expected adapters at the same modules, with the same activation and insertion form and without "
                    f"layer_norm, found '{adapters[0]}' ({first.form}, {len(places[0])} modules) and '{name}' "
                    f"({config.form}, {len(found)} modules). Activate them together instead: they add up."
                )
        width = sum(config.bottleneck_size for config in configs)
        with_bias = any(config.use_bias for config in configs)
        self._inject_combination(adapter_name, replace(first, bottleneck_size=width, use_bias=with_bias, scale=1.0))
        for name in places[0]:
            _put_side_by_side(layers[name], adapters, weights, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check the numbers of a file before any tensor reaches the model."""
        for key, tensor in state_dict.items():
            if cls.prefix in key and not tensor.is_meta and not tensor.isfinite().all():
                raise FileFormatError(
                    f"Expected finite numbers in the adapter file, found NaN or infinity in '{key}'. The file is "
                    "damaged, or training diverged: load an earlier checkpoint."
                )
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


@torch.no_grad()
def _put_side_by_side(layer: BottleneckLayer, adapters: list[str], weights: list[float], adapter_name: str) -> None:
    """Fill an adapter with others, weighted, whose bottlenecks are as wide together."""
    down, up = layer.bottleneck_adapter_down[adapter_name], layer.bottleneck_adapter_up[adapter_name]
    begin = 0
    for bias in (down.bias, up.bias):
        if bias is not None:
            bias.zero_()
    for name, weight in zip(adapters, weights, strict=True):
        pair = layer.pair(name)
        end = begin + pair.down.shape[0]
        down.weight[begin:end] = pair.down
        up.weight[:, begin:end] = weight * pair.up
        if pair.down_bias is not None:
            down.bias[begin:end] = pair.down_bias
        if pair.up_bias is not None:
            up.bias.add_(pair.up_bias, alpha=weight)
        begin = end


register("bottleneck_adapter", BottleneckConfig, BottleneckModel)
