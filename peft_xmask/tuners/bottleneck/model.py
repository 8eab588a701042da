"""The tuner of the bottleneck adapter."""

from __future__ import annotations

from peft import PeftConfig
from torch import Tensor, nn

from ...core.sites import Site
from ...errors import FileFormatError
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


register("bottleneck_adapter", BottleneckConfig, BottleneckModel)
