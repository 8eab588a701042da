"""A tuner that leaves adapter layers of other methods alone: those of a LoRA beneath its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ...errors import ConfigError
from .base_fingerprint import fingerprint_lora, renewed
from .beneath import THE_WAY, OneMethod, kind_of, layers_of_others, refuse_other_methods, set_lora
from .config import TargetConfig
from .peft_private import AuxiliaryTrainingWrapper, BaseTuner, onload_layer, refuse_in_mixed_models
from .sharded import refuse_parts
from .state import RootTable


class OwnLayersTuner(BaseTuner):
    """PEFT's base tuner, whose walks over all adapter layers of a model visit those of this method only.

    A subclass names its ``layer_cls`` (what is put in place of a module).
    """

    layer_cls: type[Any]
    over_lora = False
    """Whether a LoRA can be beneath adapters of this method, see :func:`peft_xmask.as_base`."""

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """See :class:`peft.tuners.tuners_utils.BaseTuner`.

        Raises:
            ConfigError: the model has adapters of another method, except for LoRAs beneath.
        """
        configs = OneMethod({adapter_name: peft_config} if isinstance(peft_config, PeftConfig) else peft_config)
        refuse_other_methods(
            model,
            adapter_name,
            kind_of(configs[adapter_name]),
            own=self.tuner_layer_cls,
            over_lora=self.over_lora,
            direct=isinstance(peft_config, PeftConfig),
        )
        super().__init__(model, configs, adapter_name, *args, **kwargs)

    def set_lora(self, adapter_names: str | list[str]) -> None:
        """Choose which LoRAs beneath this adapter are active, for all threads; ``[]``: none. They stay frozen.

        An adapter that is trained after a switch is recorded as made for the LoRA that is active when it is saved.

        Raises:
            ConfigError: there is no such LoRA, see :func:`peft_xmask.as_base`.
        """
        set_lora(self.model, self.tuner_layer_cls, adapter_names)

    def _own_modules(self) -> Iterator[Any]:
        """Layers of this method, and heads: what PEFT's walks visit, without a LoRA beneath."""
        for module in list(self.model.modules()):
            if isinstance(module, (self.tuner_layer_cls, AuxiliaryTrainingWrapper)):
                yield module

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        for module in self._own_modules():
            module.enable_adapters(enabled)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base's weights, where that is exact; see ``unmerge_adapter``."""
        self._check_merge_allowed()
        for module in self._own_modules():
            if not isinstance(module, AuxiliaryTrainingWrapper):
                with onload_layer(module):
                    module.merge(adapter_names=adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        """Unmerge all adapters. The base's weights are those from before, bit for bit."""
        for module in self._own_modules():
            if not isinstance(module, AuxiliaryTrainingWrapper):
                with onload_layer(module):
                    module.unmerge()

    def _unload_and_optionally_merge(  # type: ignore[override]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if not any(True for _ in layers_of_others(self.model, self.tuner_layer_cls)):
            done: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)  # type: ignore[func-returns-value]
            return done
        if merge:
            self._check_merge_allowed()
        for name, module in list(self.model.named_modules()):
            parent, _, child = name.rpartition(".")
            if isinstance(module, self.layer_cls):
                with onload_layer(module):
                    if merge:
                        module.merge(safe_merge=safe_merge, adapter_names=adapter_names)
                setattr(self.model.get_submodule(parent), child, module.base_layer)
            elif isinstance(module, AuxiliaryTrainingWrapper):
                inner = module.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
                setattr(self.model.get_submodule(parent), child, inner)
        del self.model.peft_config
        return self.model

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's ``convert_to_lora`` can take the adapter. For X-PEFT there is ``export_lora``."""
        return not any(isinstance(module, RootTable) for module in self._own_modules()) and bool(
            super().supports_lora_conversion(adapter_name)
        )

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """What is saved: tensors of this method's layers. A trained adapter records which LoRA is beneath it now.

        Raises:
            ConfigError: ZeRO-3 has sharded what is trained, and the state dict has parts.
        """
        refuse_parts(model, state_dict)
        entries: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        layers = [f"{name}." for name, _ in layers_of_others(model, cls.tuner_layer_cls)]
        if layers and isinstance(config, TargetConfig) and not config.inference_mode:
            root = model.get_base_model() if isinstance(model, PeftModel) else model
            config.base_fingerprint = renewed(config.base_fingerprint, fingerprint_lora(root, cls.tuner_layer_cls))
        return {key: tensor for key, tensor in entries.items() if not key.startswith(tuple(layers) or ("\0",))}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Give heads memory that the file can be loaded into, where they were copied from a base without weights."""
        for wrapper in model.modules():
            if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save:
                for part in wrapper.modules_to_save[adapter_name].modules():
                    for name, parameter in part.named_parameters(recurse=False):
                        if parameter.is_meta:
                            empty = torch.zeros_like(parameter, device="cpu")
                            setattr(part, name, nn.Parameter(empty, parameter.requires_grad))
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        return remapped


def _refuse_mixed(config: PeftConfig) -> None:
    if isinstance(config, TargetConfig):
        raise ConfigError(
            f"A PeftMixedModel cannot save adapters and does not know {kind_of(config)}. To have masks or a bottleneck "
            f"adapter over a LoRA, use {THE_WAY}."
        )


refuse_in_mixed_models(_refuse_mixed)
