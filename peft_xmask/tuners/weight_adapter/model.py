"""The tuner of the weight adapter."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from ...core.files import dtype_from_name
from ...errors import ConfigError, TargetError
from ..base.experts import is_fused_experts
from ..base.peft_private import register
from ..base.targets import FFN_LINEAR
from ..in_place.combining import combine
from ..in_place.tuner import TABLE, InPlaceTuner, find_table, parameter_names
from .config import WeightAdapterConfig
from .layer import AdaptedParameter, ModuleAdapter, ResultTable, StoredChange, WeightAdapterLayer, WeightAdapterModule
from .product import Start


class WeightAdapterModel(InPlaceTuner):
    """Trains adapters over the biases, or weights, of the targeted modules.

    Made by ``get_peft_model(model, WeightAdapterConfig(...))``.
    """

    prefix = "weight_adapter_"
    tuner_layer_cls = WeightAdapterModule
    layer_cls = WeightAdapterLayer
    table_cls = ResultTable
    target_module_mapping: Any = FFN_LINEAR
    usual_targets = "the linear layers of each feed-forward network"

    def _prepare_targets(
        self, config: WeightAdapterConfig, model: nn.Module, found: list[tuple[str, nn.Module]]
    ) -> dict[str, ModuleAdapter]:
        named = self._injection.named
        whole = [(name, layer) for name, layer in found if name not in named]
        _refuse_missing_biases(config, whole)
        _refuse_other_weights([each for each in found if each[0] in named or config.target != "bias"])
        names = [named.get(name) or _adapted_parameters(layer, config) for name, layer in found]
        self._check_targets(model, found, names)
        of_file = config.base_fingerprint is not None
        self._check_base(config, (each for _, layer in found for each in _known_by(layer)))
        self._new = [getattr(layer, name).numel() for (_, layer), own in zip(found, names, strict=True) for name in own]
        indexes = count()
        return {
            name: _module_adapter(config, [(each, getattr(layer, each), next(indexes)) for each in own], of_file)
            for (name, layer), own in zip(found, names, strict=True)
        }

    def _add_to_layer(
        self, layer: WeightAdapterLayer, config: WeightAdapterConfig, adapter_name: str, part: ModuleAdapter
    ) -> None:
        if self._is_first(adapter_name):
            if not hasattr(self.model, TABLE):
                self._make_table()
                self.table.hooks.append(self.model.register_load_state_dict_pre_hook(_load_served_state))
            dtype = dtype_from_name(config.storage_dtype or "float32")
            device = next(iter(layer.get_base_layer().parameters())).device
            start = StoredChange.zeros(sum(self._new), dtype, device)
            rounding = None if dtype == torch.float32 else dtype
            self.table.add(adapter_name, start if part.trained else start.clone(), self._new, rounding)
            self._copy_stored(adapter_name)
        layer.add(adapter_name, part, self.table, config.dropout)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "avg"
    ) -> None:
        """Add an adapter whose change of the parameters is a weighted sum of others' changes.

        Args:
            adapters: names of adapters.
            weights: one for each.
            adapter_name: of the new adapter, whose config is that of the first; it is not set active. Training goes on
                from the sum.
            combination_type: ``"avg"`` (the weights are divided by their sum) or ``"linear"``.

        Raises:
            ConfigError: names or weights are invalid, or the adapters change other parameters.
        """
        self._check_combination(adapters, weights, adapter_name)
        parts = [self._parts(name) for name in adapters]
        for name, found in zip(adapters, parts, strict=True):
            if found != parts[0]:
                raise ConfigError(
                    f"Expected adapters of the same parameters, found '{adapters[0]}' and '{name}' with other "
                    "modules or another target. Activate them together instead: they add up."
                )
        total = combine([self._change(name) for name in adapters], weights, combination_type)
        self._inject_combination(adapter_name, replace(self.peft_config[adapters[0]]))
        holder = self.table.holders[adapter_name]
        with torch.no_grad():
            holder.weight = holder.weight.clone()  # room for what is to be kept
            holder.weight.copy_(total)

    def _parts(self, adapter_name: str) -> list[tuple[str, str, int]]:
        """Which parameters an adapter changes, and their places in its vector."""
        return [
            (name, each.name, each.part)
            for name, layer in adapted_layers(self.model, adapter_name).items()
            for each in layer.weight_adapter_adapted[adapter_name].adapted
        ]

    def _change(self, adapter_name: str) -> Tensor:
        """All that an adapter changes, as one vector."""
        layers = adapted_layers(self.model, adapter_name).values()
        results = sorted((each for layer in layers for each in layer.result(adapter_name)), key=lambda each: each[0])
        return torch.cat([result.reshape(-1).float() for _, result in results])

    def _copy_stored(self, adapter_name: str) -> None:
        """For trl's reference adapter, which is made with the policy's config object and given its parameters only."""
        source = self._injection.copied_from
        if source is not None:
            self.table.holders[adapter_name].weight = self.table.holders[source].weight.clone()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Trainable values are float32 from the start; without PEFT's autocast they take the base's dtype instead.

        Stored changes keep the dtype of their file.
        """
        if autocast_adapter_dtype:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
            return
        for layer in adapted_layers(self.model, adapter_name).values():
            for name in layer.factors(adapter_name):
                getattr(layer, name)[adapter_name].to(layer.dtype)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """The base's parameters and the stored changes: every process has loaded them, so DDP need not send them."""
        stored = [f"base_model.{name}" for name, _ in self.named_buffers() if ".weight_adapter_delta." in name]
        return [*super()._ddp_params_and_buffers_to_ignore, *stored]

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """The saved state: the change alone, in its storage dtype."""
        entries = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        layers = adapted_layers(model, adapter_name).values()
        if not any(layer.factors(adapter_name) for layer in layers):
            return entries
        results = sorted((each for layer in layers for each in layer.result(adapter_name)), key=lambda each: each[0])
        ((key, stored),) = entries.items()
        return {key: torch.cat([result.reshape(-1).to(stored.device) for _, result in results]).to(stored.dtype)}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check a file before any tensor reaches the model; an adapter to be trained starts anew on top of it."""
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return {**state_dict, **_fresh_start(model, adapter_name)}


def _fresh_start(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Factors of an adapter that begins anew on top of a stored change, by name; none where it is not trained."""
    fresh = {
        f"{name}.{key}.{adapter_name}.weight": tensor
        for name, layer in adapted_layers(model, adapter_name).items()
        if layer.factors(adapter_name)
        for key, tensor in layer.fresh_factors(adapter_name, at_base=True).items()
    }
    if fresh:
        holder = find_table(model).holders[adapter_name]
        holder.weight = holder.weight.clone()  # room for what is to be kept
    return fresh


def _load_served_state(root: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Pre-hook of the root's ``load_state_dict``: give a model that trains the state of one that serves.

    The other model has no factors, for example in ``SentenceTransformerTrainer``, which loads a checkpoint as a new
    model and copies its state. The adapter begins anew on top of the stored change, as with a file.

    Raises:
        FileFormatError: the stored change does not fit, or is not finite.
    """
    table = find_table(root)
    for name in table.holders:
        key = f"{prefix}{TABLE}.{table.state_name}.{name}.weight"
        factors = [
            f"{prefix}{at}.{each}.{name}.weight"
            for at, layer in adapted_layers(root, name).items()
            for each in layer.factors(name)
        ]
        if key in state_dict and factors and not any(each in state_dict for each in factors):
            state_dict[key] = table[name].check_stored(state_dict[key])
            state_dict.update({prefix + each: tensor for each, tensor in _fresh_start(root, name).items()})


def adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, WeightAdapterLayer]:
    """The layers of a model that an adapter changes, by name."""
    named = model.named_modules()
    return {name: each for name, each in named if isinstance(each, WeightAdapterLayer) and each.has(adapter_name)}


def _module_adapter(
    config: WeightAdapterConfig, parameters: list[tuple[str, Tensor, int]], of_file: bool
) -> ModuleAdapter:
    """Of the parameters' names, numbers and indexes. A file says how the adapter differs from the base."""
    at_base = config.init_weights or of_file
    adapted = [
        AdaptedParameter(name, index, Start(config.r, _has_shift(config, numbers), at_base))
        for name, numbers, index in parameters
    ]
    return ModuleAdapter(adapted, trained=not config.inference_mode, activation=config.activation, scale=config.scale)


def _has_shift(config: WeightAdapterConfig, numbers: Tensor) -> bool:
    return not bool(numbers.any()) if config.adapter_bias is None else config.adapter_bias


def _adapted_parameters(layer: nn.Module, config: WeightAdapterConfig) -> list[str]:
    names = parameter_names(layer, bias=config.target != "weight")
    return [name for name in names if config.target == "both" or (config.target == "bias") == ("bias" in name)]


def _known_by(layer: nn.Module) -> list[Tensor]:
    """The parameters that tell a base from others: biases alone may all be zero."""
    numbers = [getattr(layer, name, None) for name in ("weight", "bias")]
    return [each for each in numbers if each is not None] or list(layer.parameters(recurse=False))


def _refuse_missing_biases(config: WeightAdapterConfig, found: list[tuple[str, nn.Module]]) -> None:
    """With ``target="bias"``, every target must have one: none is created, which the base could not keep."""
    without = [name for name, layer in found if not _adapted_parameters(layer, config)]
    if config.target != "bias" or not without:
        return
    none = len(without) == len(found)
    raise TargetError(
        (f"None of the {len(found)} targeted modules has" if none else f"Module '{without[0]}' does not have")
        + ' a bias, which target="bias" adapts. One that was created would slow the base down and could not be folded '
        'into it. Use target="weight", or target="both" to adapt such biases as there are'
        + ("; or name modules that have a bias in target_modules." if none else "; or exclude such modules.")
    )


def _refuse_other_weights(found: list[tuple[str, nn.Module]]) -> None:
    """Reject quantised and sharded weights, which an adapter can neither read nor write."""
    for name, layer in found:
        own = layer._parameters if is_fused_experts(layer) else {"weight": getattr(layer, "weight", None)}
        for parameter, weight in own.items():
            plain = type(weight) in (Tensor, nn.Parameter)
            if not isinstance(weight, Tensor) or (plain and torch.is_floating_point(weight)):
                continue
            raise TargetError(
                f"The {parameter} of '{name}' is quantised or sharded ({type(weight).__name__}, {weight.dtype}), "
                'so that an adapter over it cannot be written into it. Use target="bias": biases are not quantised.'
            )


register("weight_adapter", WeightAdapterConfig, WeightAdapterModel)
