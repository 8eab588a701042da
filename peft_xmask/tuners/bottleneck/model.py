"""The tuner of the bottleneck adapter."""

from __future__ import annotations

from torch import nn

from ...core.sites import Site
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


register("bottleneck_adapter", BottleneckConfig, BottleneckModel)
