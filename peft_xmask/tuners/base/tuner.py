"""What our tuners share: find targets, check the base, insert layers, and leave the model intact on errors."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from ...core.fingerprint import fingerprint_weights
from ...errors import ConfigError, TargetError
from .base_fingerprint import check_fingerprint, fingerprint_lora, joined
from .calls import FirstPassWatch, refuse_uncalled, worth_adapting
from .classifier import Classifier
from .config import TargetConfig
from .experts import is_fused_experts
from .layer import TargetLayer, find_slow_path
from .mixed_batch import MixedBatches
from .own_layers import OwnLayersTuner
from .peft_private import (
    AuxiliaryTrainingWrapper,
    BaseTunerLayer,
    check_target_module_exists,
    include_all_linear_layers,
)
from .targets import FFN_OUTPUT, torch_blocks

_LAYER_INDEX = re.compile(r".*?\.[^.]*\.(\d+)\.")


@dataclass
class Injection:
    """What is found out while one adapter is being put into a model.

    Attributes:
        copied_from: the adapter whose config object was passed (trl makes its reference adapter that way); None: none.
        parts: what each target gets, by its name.
        named: parameters of a target that the config names itself, by the target's name.
    """

    copied_from: str | None
    named: dict[str, list[str]] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)


class TargetTuner(OwnLayersTuner):
    """Base of our tuners: wraps the modules that a config targets.

    A subclass names its ``prefix``, its ``tuner_layer_cls`` (what PEFT's walks visit), its ``layer_cls`` (what is put
    in place of a module), and implements :meth:`_prepare_targets` and :meth:`_add_to_layer`.
    """

    layer_cls: type[Any]
    usual_targets: str
    """What error messages suggest as ``target_modules``."""
    injection_cls: type[Injection] = Injection
    _injection: Any

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        """Resolve ``target_modules=None``.

        Raises:
            TargetError: the architecture has no default targets.
        """
        if peft_config.target_modules is None:
            peft_config.target_modules = self._default_targets(str(model_config.get("model_type")))
        return super()._prepare_adapter_config(peft_config, model_config)

    def _default_targets(self, model_type: str) -> str | set[str]:
        known: Any = self.target_module_mapping
        if model_type in known:
            return str(known[model_type])
        if found := torch_blocks(self.model, output_only=known is FFN_OUTPUT):
            return found
        fused = next((name for name, module in self.model.named_modules() if is_fused_experts(module)), None)
        raise TargetError(
            f"No default target_modules for the architecture {model_type!r}. Pass target_modules, the names of the "
            f"modules to adapt (usually {self.usual_targets}). Architectures with a default: "
            f"{', '.join(sorted(known))}."
            + (
                ""
                if fused is None
                else f" '{fused}' is a mixture of experts in fused parameters: MagnitudeMaskConfig and "
                "WeightAdapterConfig adapt them; XPEFTConfig and BottleneckConfig can have an adapter beside it."
            )
        )

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, or leave the model and the config unchanged on an error.

        A config for training is copied, so that it can serve for other bases too. One for inference is that of an
        adapter being loaded: as in PEFT, the model keeps the object that the caller passed and completes it.

        Raises:
            ConfigError: an adapter of this name exists, or ``state_dict`` was passed to choose the targets.
            ConfigError: the adapter's head pools otherwise than the model, or has its labels in another order.
            TargetError, BaseMismatchError: see :meth:`_prepare_model`.
        """
        if kwargs.get("state_dict") is not None:
            raise ConfigError(
                f"{self.peft_config[adapter_name].peft_type} cannot find its targets in a state dict, since its file "
                "does not name them. Pass a config with `target_modules` instead."
            )
        given: Any = self.peft_config[adapter_name]
        others = (name for name, other in self.peft_config.items() if other is given and name != adapter_name)
        self._injection = self.injection_cls(copied_from=next(others, None))
        loading = given.inference_mode and not given.fits_any_base and self._injection.copied_from is None
        before = dict(vars(given))
        self.peft_config[adapter_name] = given if loading else copy.deepcopy(given)
        self._mixed_batches.forget_modules()
        try:
            _agree_on_head(self.peft_config[adapter_name], model)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            FirstPassWatch(model, {name: model.get_submodule(name) for name in self._injection.parts})
        except BaseException:
            vars(given).clear()
            vars(given).update(before)
            raise
        finally:
            del self._injection

    @cached_property
    def _mixed_batches(self) -> MixedBatches:
        return MixedBatches()

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Find the targets and check everything before the first module is replaced."""
        everything = str(peft_config.target_modules).lower() == "all-linear"
        include_all_linear_layers(peft_config, model)
        if everything:
            peft_config.target_modules = worth_adapting(model, peft_config.target_modules)
        found = self._find_targets(peft_config, model)
        refuse_uncalled(model, [name for name, _ in found])
        if found:  # PEFT raises its own error for targets that match nothing
            self._injection.parts = self._prepare_targets(peft_config, model, found)

    def _find_targets(self, config: TargetConfig, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The targeted base modules by name, in the model's order."""
        inside: tuple[str, ...] = ()
        found = []
        for name, module in model.named_modules():
            if not name or name.startswith(inside or ("\0",)):
                continue
            if isinstance(module, BaseTunerLayer):
                inside = (*inside, f"{name}.")
            if self._check_target_module_exists(config, name):
                found.append((name, module.get_base_layer() if isinstance(module, BaseTunerLayer) else module))
        return found

    def _check_base(self, config: TargetConfig, weights: Iterable[Tensor | None]) -> None:
        found = joined(fingerprint_weights(weights), fingerprint_lora(self.model, self.tuner_layer_cls))
        config.base_fingerprint = check_fingerprint(config.base_fingerprint, found, config.base_model_name_or_path)

    def _prepare_targets(self, config: Any, model: nn.Module, found: list[tuple[str, nn.Module]]) -> dict[str, Any]:
        """Check everything and prepare each target's part, by name. Raises before anything is changed."""
        raise NotImplementedError

    def _add_to_layer(self, layer: Any, config: Any, adapter_name: str, part: Any) -> None:
        """Give a layer its part of the adapter."""
        raise NotImplementedError

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        """PEFT's rule, and ``layers_to_transform`` also with a regular expression as ``target_modules``."""
        found = check_target_module_exists(peft_config, key)
        indexes = peft_config.layers_to_transform
        if found and isinstance(peft_config.target_modules, str) and indexes is not None:
            wanted = [indexes] if isinstance(indexes, int) else list(indexes)
            index = _layer_index(key, peft_config.layers_pattern)
            return index is not None and index in wanted
        return found

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, self.layer_cls):
            self._add_to_layer(target, peft_config, adapter_name, self._injection.parts[current_key])
            return
        layer = self._new_layer(target)
        self._add_to_layer(layer, peft_config, adapter_name, self._injection.parts[current_key])
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)
        layer.slow_path = find_slow_path(self.model, current_key, layer)
        if layer.slow_path is not None:
            layer.slow_path.take(not layer.disable_adapters)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """PEFT's; but a module taken out of its layer is put back as it is, since fused experts have no ``weight``."""
        if isinstance(child, TargetLayer) and child.get_base_layer() is new_module:
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _new_layer(self, target: nn.Module) -> Any:
        """The layer that replaces a module."""
        return self.layer_cls(target)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = ""
    ) -> None:
        """Add an adapter that is a weighted sum of others, for methods in which such a sum is an adapter.

        Raises:
            ConfigError: here it is not.
        """
        kinds = {str(getattr(config.peft_type, "value", config.peft_type)) for config in self.peft_config.values()}
        raise ConfigError(
            f"A weighted sum of {' and '.join(sorted(kinds))} adapters is not an adapter of that method: a sum of "
            "k-of-N masks does not choose k of N, and the product of two summed mixes has cross terms. Activate "
            "several adapters at once to add them with weight 1 (model.base_model.set_adapter([...])). For other "
            "weights, convert linear ones with peft.convert_to_lora and combine the LoRAs."
        )

    def _check_combination(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Refuse names and weights that cannot make a new adapter."""
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown or not adapters or adapter_name in self.peft_config:
            raise ConfigError(
                f"Expected names of adapters and a new name, found {adapters} and {adapter_name!r}. There are: "
                f"{', '.join(sorted(self.peft_config))}."
            )
        if len(weights) != len(adapters) or not all(math.isfinite(weight) for weight in weights):
            raise ConfigError(f"Expected one finite weight for each of {adapters}, found {weights}.")

    def _inject_combination(self, adapter_name: str, config: Any) -> None:
        """Put a new adapter into the model, to be filled with a sum; on an error the model is as before."""
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise

    def unload(self) -> nn.Module:
        """The base model alone, bit for bit. Merged adapters are unmerged first; ``merge_and_unload`` keeps them."""
        self.unmerge_adapter()
        model: nn.Module = super().unload()
        return model

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        for module in self.model.modules():
            if isinstance(module, TargetLayer) and module.slow_path is not None:
                module.slow_path.take(False)
        self._mixed_batches.leave()
        return super()._unload_and_optionally_merge(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Pass ``adapter_names``, one name for each example of the batch, to the layers."""
        names = kwargs.pop("adapter_names", None)
        if names is not None:
            names = self._check_adapter_names(list(names))
        modules = (each for each in self.modules() if isinstance(each, (self.layer_cls, AuxiliaryTrainingWrapper)))
        with self._mixed_batches.call(self.model, modules, names, kwargs.get("num_beams") or 1):
            yield

    def _check_adapter_names(self, names: list[str]) -> list[str]:
        if self.training:
            raise ConfigError(
                "Cannot pass `adapter_names` when the model is in training mode. Call model.eval() first."
            )
        self._refuse_merged()
        unknown = sorted({name for name in names if name != "__base__"} - set(self.peft_config))
        if unknown:
            raise ConfigError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. Known: "
                f"{', '.join(sorted(self.peft_config))}, or '__base__' for none."
            )
        return names

    def _refuse_merged(self) -> None:
        """Reject ``adapter_names`` while an adapter is merged, because a merged adapter applies to every row."""
        if any(module.merged for module in self.model.modules() if isinstance(module, BaseTunerLayer)):
            raise ConfigError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )


def _agree_on_head(config: Any, model: nn.Module) -> None:
    """Record the model's classification head in a new adapter's config, or check that it is the one recorded there."""
    if config.classifier is not None:
        Classifier.from_fields(config.classifier).give_to(model)
    elif config.task_type == "SEQ_CLS" and (head := Classifier.of(model)) is not None:
        config.classifier = head.to_fields()


def _layer_index(name: str, patterns: str | list[str] | None) -> int | None:
    if not patterns:
        match = _LAYER_INDEX.match(name)
        return int(match.group(1)) if match else None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name):
            return int(match.group(1))
    return None
