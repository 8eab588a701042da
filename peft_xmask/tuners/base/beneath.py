"""A LoRA beneath our adapters: a base model that keeps LoRA layers, frozen and unmerged.

PEFT's tools assume that all adapters of a model are of one method. With two methods in one model they disable, unload
and merge both, drop one of the heads, and give one adapter the name of the other. So a model with a LoRA is first
turned into a base of its own, which belongs to no ``PeftModel``; our tuners then leave its layers alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ...errors import ConfigError
from .peft_private import AuxiliaryTrainingWrapper, BaseTunerLayer, LoraLayer

THE_WAY = "get_peft_model(as_base(lora_model), XPEFTConfig(...)), with peft_xmask.as_base"
"""What errors tell a user to do."""


def as_base(model: nn.Module) -> nn.Module:
    """Turn a model with LoRAs into a base for X-PEFT masks or bottleneck adapters, with the LoRAs frozen, not merged.

    ``get_peft_model`` and ``PeftModel.from_pretrained`` take the result like any base. To them, "the base" is the model
    with its LoRAs: it is what remains when their adapter is disabled, unloaded or deleted, bit for bit. The head that
    was trained with the LoRA becomes the base's own head. ``set_lora`` on the new model chooses which LoRAs are active.

    The model is changed in place. A ``PeftModel`` that is passed cannot be used afterwards: save its LoRA first.

    Args:
        model: a ``PeftModel`` with LoRAs, or a model into which LoRAs were put by ``inject_adapter_in_model`` or by
            transformers' ``load_adapter`` or ``add_adapter``.

    Returns:
        The model inside the ``PeftModel``, or ``model`` itself.

    Raises:
        ConfigError: the model has no LoRA, adapters of another method, a merged LoRA, or a head for each of several
            LoRAs.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    _check_layers(base)
    heads = {name: module for name, module in base.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}
    _check_heads(heads)
    for name, wrapper in heads.items():
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, wrapper.unload_and_optionally_merge_module(False, False, None))
    base.requires_grad_(False)
    if hasattr(base, "peft_config"):
        del base.peft_config
    if getattr(base, "_hf_peft_config_loaded", False):
        base._hf_peft_config_loaded = False
    if isinstance(model, PeftModel):
        model.base_model = _Spent()
    return base  # type: ignore[no-any-return]


def _check_layers(base: nn.Module) -> None:
    layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
    others = sorted({type(layer).__name__ for layer in layers if not isinstance(layer, LoraLayer)})
    if others or not layers:
        raise ConfigError(
            f"Expected a model with LoRA layers, found {', '.join(others) or 'none'}. Only LoRAs can stay beneath "
            "other adapters. A model without adapters is a base as it is; adapters of other methods can be merged "
            "(model.merge_and_unload()) if that is exact enough."
        )
    if any(parameter.is_meta for layer in layers for parameter in layer.parameters()):
        raise ConfigError("The model or its LoRA is on the meta device. Load their weights first, then call as_base.")
    if any(layer.merged for layer in layers):
        raise ConfigError(
            "A LoRA of this model is merged into its weights. Call model.unmerge_adapter() first, or "
            "model.merge_and_unload() for a base without LoRA layers."
        )


def _check_heads(wrappers: Mapping[str, nn.Module]) -> None:
    for name, wrapper in wrappers.items():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            raise ConfigError(
                f"Module '{name}' has trained tokens (trainable_token_indices), which cannot stay beneath other "
                "adapters. Call model.merge_and_unload() instead."
            )
        if len(wrapper.modules_to_save) > 1:
            raise ConfigError(
                f"Several adapters have a module '{name}' of their own ({', '.join(sorted(wrapper.modules_to_save))}), "
                "and a base has one. Delete the others first: model.delete_adapter(name)."
            )


class _Spent(nn.Module):
    """Takes the place of a model that became a base."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            return super().__getattr__(name)
        raise ConfigError(
            "This PeftModel's model was turned into a base by as_base, so it can no longer be used. Use the base that "
            "as_base returned."
        )

    def forward(self, *_: Any, **__: Any) -> Any:
        """Refuse to run."""
        return self.model


class OneMethod(dict[str, PeftConfig]):
    """The configs of a model's adapters, all of one method.

    PEFT's tuners enter their config here, where another tuner has left it, before they change the model.

    Raises:
        ConfigError: a config of another method is entered.
    """

    def __setitem__(self, name: str, config: PeftConfig) -> None:
        """Enter a config."""
        self._check(config)
        super().__setitem__(name, config)

    def update(self, other: Any = (), /, **named: PeftConfig) -> None:
        """Enter several configs."""
        for name, config in dict(other, **named).items():
            self[name] = config

    def _check(self, config: PeftConfig) -> None:
        kinds, added = {kind_of(each) for each in self.values()}, kind_of(config)
        if kinds and added not in kinds:
            raise ConfigError(
                f"This model has adapters of {', '.join(sorted(kinds))}; an adapter of {added} cannot be added to it. "
                f"A LoRA goes beneath other adapters, not on top: take them off with unload(), load the LoRA, and then "
                f"make the others with {THE_WAY}."
            )


def refuse_other_methods(
    model: nn.Module, adapter_name: str, method: str, *, own: type, over_lora: bool, direct: bool
) -> None:
    """Refuse a base whose adapters belong to somebody else, before anything is changed.

    Args:
        model: to be adapted.
        adapter_name: of the new adapter.
        method: its PEFT type.
        own: class of the tuner's own layers.
        over_lora: whether the method can have a LoRA beneath it.
        direct: whether the adapter is put into a model without a ``PeftModel`` around it.

    Raises:
        ConfigError: see above.
    """
    if isinstance(model, PeftModel):
        raise ConfigError(
            f"Expected a base model, found a {type(model).__name__}, which has adapters of "
            f"{model.peft_type}. To keep its LoRA beneath an adapter of {method}, use {THE_WAY}; or merge it "
            "first: model.merge_and_unload()."
        )
    layers = dict(layers_of_others(model, own))
    if not layers:
        return
    found = ", ".join(sorted({type(layer).__name__ for layer in layers.values()}))
    if not over_lora:
        raise ConfigError(
            f"The model has adapter layers of another method ({found}). {method} writes into the base's parameters and "
            "needs a base without other adapters: merge them first (model.merge_and_unload()). XPEFTConfig and "
            "BottleneckConfig can have a LoRA beneath them, see peft_xmask.as_base."
        )
    foreign = [name for name, config in getattr(model, "peft_config", {}).items() if kind_of(config) != method]
    if foreign or not all(isinstance(layer, LoraLayer) for layer in layers.values()):
        raise ConfigError(
            f"The model has adapter layers of another method ({found}), which PEFT would disable, unload and save "
            f"together with those of {method}. Use {THE_WAY}: it takes LoRAs out of PEFT's hands."
        )
    if direct:
        raise ConfigError(
            "transformers' own adapter methods (load_adapter, add_adapter) and inject_adapter_in_model would "
            f"deactivate the LoRA beneath. Use PeftModel.from_pretrained(base, folder), or {THE_WAY}."
        )
    names = {name for layer in layers.values() for name in layer._all_available_adapter_names()}
    if adapter_name in names:
        raise ConfigError(
            f"The base has a LoRA called '{adapter_name}', and PEFT finds adapters by name. Pass another adapter_name, "
            'such as adapter_name="masks".'
        )


def kind_of(config: PeftConfig) -> str:
    """The name of a config's method."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def layers_of_others(model: nn.Module, own: type) -> Iterator[tuple[str, Any]]:
    """Adapter layers of a model that are not of a tuner's own class, by name."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, own):
            yield name, module


def set_lora(model: nn.Module, own: type, adapter_names: str | Iterable[str]) -> None:
    """Activate LoRAs beneath, which stay frozen.

    Raises:
        ConfigError: there is none of that name.
    """
    wanted = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    layers = [layer for _, layer in layers_of_others(model, own)]
    known = sorted({name for layer in layers for name in layer._all_available_adapter_names()})
    if unknown := [name for name in wanted if name not in known]:
        raise ConfigError(
            f"No LoRA {', '.join(map(repr, unknown))} beneath this adapter. There are: {', '.join(known) or 'none'}."
        )
    for layer in layers:
        layer.set_adapter(wanted, inference_mode=True)
