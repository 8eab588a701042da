"""The tuner of adapters that read activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core.sites import Site
from ...errors import MergeError, TargetError
from ..base.owners import Owners
from ..base.targets import FFN_OUTPUT
from ..base.tuner import TargetTuner
from .config import SiteConfig
from .layer import SiteLayer
from .places import place_of


class SiteTuner(TargetTuner):
    """Base of the tuners that put an adapter on sites: it reads the activations of a linear module.

    A subclass implements :meth:`_prepare_sites` and :meth:`_add_to_layer`; its ``layer_cls`` is a
    :class:`~peft_xmask.tuners.sites.layer.SiteLayer`.
    """

    layer_cls: type[SiteLayer]
    target_module_mapping: Any = FFN_OUTPUT
    usual_targets = "the last linear layer of each feed-forward network"
    over_lora = True

    def _prepare_targets(
        self, config: SiteConfig, model: nn.Module, found: list[tuple[str, nn.Module]]
    ) -> dict[str, Any]:
        sites = [_site(config, name, layer) for name, layer in found]
        layers = [layer for _, layer in found]
        self._check_base(config, map(_numbers, layers))
        if any(_is_meta(layer) for layer in layers):
            self._check_base_later(config, model, layers)
        return self._prepare_sites(config, model, sites)

    def _check_base_later(self, config: SiteConfig, model: nn.Module, layers: list[nn.Module]) -> None:
        """Check the base in the first forward pass, since its weights are on the meta device now.

        A base whose weights come from a disk module by module is not checked.
        """

        def check(*_: Any) -> None:
            if torch.compiler.is_compiling():
                return
            if any(config is each for each in getattr(model, "peft_config", {}).values()):
                self._check_base(config, map(_numbers, layers))  # again in the next pass, if it raises
            handle.remove()

        handle = model.register_forward_pre_hook(check)

    def _prepare_sites(self, config: SiteConfig, model: nn.Module, sites: list[Site]) -> dict[str, Any]:
        """Check everything and prepare each site's part, by name. Raises before anything is changed."""
        raise NotImplementedError

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """As in PEFT, which would move a pool to the meta device if the base is there."""
        if isinstance(new_module, SiteLayer) and _is_meta(new_module.get_base_layer()):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)  # type: ignore[no-untyped-call]

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in PEFT; a merge that would not be exact is refused before any weight is changed."""
        self._check_merge(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self, merge: bool = True, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Any:
        if merge:
            self._check_merge(adapter_names)
        return super()._unload_and_optionally_merge(merge, *args, adapter_names=adapter_names, **kwargs)

    def _check_merge(self, adapter_names: list[str] | None) -> None:
        """Refuse adapters, by default the active ones, that some module's weight cannot hold.

        Raises:
            MergeError: as :meth:`SiteLayer.merge`, or the weight is that of another module too.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        owners = Owners(self.model)
        for name, module in self.model.named_modules():
            if not isinstance(module, SiteLayer) or all(module.form(each) is None for each in names):
                continue
            if reason := module.why_not_mergeable(names):
                raise MergeError(f"Cannot merge into '{name}': {reason}")
            base: Any = module.get_base_layer()
            if others := owners.besides(name, base.weight):
                raise MergeError(
                    f"Cannot merge into '{name}': its weight is also that of '{others[0]}' (tied weights), where the "
                    "adapter is not. Load the base with tie_word_embeddings=False, or use the adapter unmerged."
                )


def _is_meta(layer: nn.Module) -> bool:
    weight = _numbers(layer)
    return weight is not None and weight.is_meta


def _numbers(layer: nn.Module) -> Tensor | None:
    """What tells one base from another: a module's weight, or the last parameter of fused experts."""
    weight = getattr(layer, "weight", None)
    return weight if isinstance(weight, Tensor) else getattr(layer, "down_proj", None)


def _site(config: SiteConfig, name: str, layer: nn.Module) -> Site:
    place = place_of(layer)
    if place is None:
        raise TargetError(
            f"Module '{name}' is a {type(layer).__name__}, which cannot carry an adapter; expected a linear layer "
            "(nn.Linear, transformers' Conv1D, a quantised linear), a convolution, an embedding, or fused experts with "
            "a router. Change target_modules or exclude_modules. MagnitudeMaskConfig adapts any module with a weight, "
            'and WeightAdapterConfig(target="weight") too.'
        )
    if config.form.insertion_form == "sequential":
        return Site(name, place.out_features, place.out_features)
    if place.why_not_parallel is not None:
        raise TargetError(
            f"Module '{name}' is a {type(layer).__name__}, which cannot carry a parallel adapter: "
            f'{place.why_not_parallel}. Pass insertion_form="sequential", or change target_modules.'
        )
    return Site(name, place.in_features, place.out_features)
