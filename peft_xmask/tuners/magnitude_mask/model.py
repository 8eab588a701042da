"""The tuner of the magnitude mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...core.files import dtype_from_name
from ...errors import MaskMismatchError, MergeError, TargetError
from ..base.peft_private import register
from ..in_place.combining import combine
from ..in_place.flat_indices import FlatIndices
from ..in_place.tuner import InPlaceTuner, linear_layers_of_blocks, parameter_names
from .config import MagnitudeMaskConfig
from .layer import MagnitudeMaskLayer, MagnitudeMaskModule, MaskedParameter, ModuleMask, ValueTable
from .mask import Candidate, Mask, make_mask, recover_mask
from .quantised import QuantisedMaskLayer, dequantised_weight, is_quantised


class MagnitudeMaskModel(InPlaceTuner):
    """Trains the smallest weights of the targeted modules.

    Made by ``get_peft_model(model, MagnitudeMaskConfig(...))``.
    """

    prefix = "magnitude_mask_"
    tuner_layer_cls = MagnitudeMaskModule
    layer_cls = MagnitudeMaskLayer
    table_cls = ValueTable

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None and not peft_config.target_parameters:
            peft_config.target_modules = linear_layers_of_blocks(self.model)
        if peft_config.target_modules is None and not peft_config.target_parameters:
            raise TargetError(
                f"No default target_modules for a {type(self.model).__name__}: it has no list of blocks "
                "(nn.ModuleList) with linear layers in it. Pass target_modules, the names of the modules to adapt."
            )
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_targets(
        self, config: MagnitudeMaskConfig, model: nn.Module, found: list[tuple[str, nn.Module]]
    ) -> dict[str, ModuleMask]:
        named = self._injection.named
        names = [named.get(name) or _trained_parameters(layer, config) for name, layer in found]
        self._check_targets(model, found, names)
        candidates = [
            Candidate(name, _numbers(name, layer, parameter), _padding(layer, parameter))
            for (name, layer), own in zip(found, names, strict=True)
            for parameter in own
        ]
        mask = _mask_of(config, candidates, quantised=any(is_quantised(layer) for _, layer in found))
        self._check_base(
            config, (getattr(layer, each) for (_, layer), own in zip(found, names, strict=True) for each in own)
        )
        config.mask_fingerprint, config.mask_dtype, config.mask_ties = mask.fingerprint, mask.dtype, dict(mask.ties)
        indices = self._shared_indices(mask)
        self._new = (_start(config, candidates, mask), [len(each) for each in indices])
        parts, at = {}, 0
        for (name, _), own in zip(found, names, strict=True):
            mine = zip(own, indices[at : at + len(own)], range(at, at + len(own)), strict=True)
            parts[name] = ModuleMask(tuple(MaskedParameter(*each) for each in mine if len(each[1])))
            at += len(own)
        return parts

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "avg",
    ) -> None:
        """Add an adapter whose values are a weighted sum of others'. They share a mask, so the sum is exact.

        Args:
            adapters: names of adapters.
            weights: one for each.
            adapter_name: of the new adapter, whose config is that of the first; it is not set active.
            combination_type: ``"avg"`` (the weights are divided by their sum) or ``"linear"``.

        Raises:
            ConfigError: an adapter does not exist, the new name is taken, or the weights are invalid.
            MaskMismatchError: the adapters have different masks.
        """
        self._check_combination(adapters, weights, adapter_name)
        vectors = [self.table.holders[name].weight for name in adapters]
        values = combine(vectors, weights, combination_type)
        configs: dict[str, Any] = self.peft_config
        first, *others = (configs[name].mask_fingerprint for name in adapters)
        for name, fingerprint in zip(adapters[1:], others, strict=True):
            if fingerprint != first:
                raise MaskMismatchError(
                    f"Adapters '{adapters[0]}' and '{name}' have different masks ({first} and {fingerprint}); only "
                    "values of the same places can be summed. Train them with the same density, selection, scope and "
                    "targets.",
                    expected=first,
                    found=fingerprint,
                )
        self._inject_combination(adapter_name, replace(self.peft_config[adapters[0]]))
        with torch.no_grad():
            self.table.holders[adapter_name].weight.copy_(values)

    def _new_layer(self, target: nn.Module) -> MagnitudeMaskLayer:
        return QuantisedMaskLayer(target) if is_quantised(target) else MagnitudeMaskLayer(target)

    def _check_merge_allowed(self) -> None:
        """Reject merging into a quantised weight, before any weight is changed."""
        super()._check_merge_allowed()
        for name, module in self.model.named_modules():
            if isinstance(module, QuantisedMaskLayer):
                raise MergeError(f"Cannot merge into '{name}': {module.why_not_mergeable()}")

    def _shared_indices(self, mask: Mask) -> tuple[FlatIndices, ...]:
        """The index objects of an earlier adapter with the same mask, if there is one: adapters share them."""
        self._indices = getattr(self, "_indices", {})
        kept: tuple[FlatIndices, ...] = self._indices.setdefault(mask.fingerprint, mask.indices)
        return kept

    def _add_to_layer(
        self, layer: MagnitudeMaskLayer, config: MagnitudeMaskConfig, adapter_name: str, part: ModuleMask
    ) -> None:
        if self._is_first(adapter_name):
            self._make_table()
            rounding = (
                None if config.storage_dtype in (None, "float32") else dtype_from_name(config.storage_dtype or "")
            )
            self.table.add(adapter_name, *self._new, rounding)
        table = self.table
        assert isinstance(table, ValueTable)  # it is of this tuner's table_cls
        layer.add(adapter_name, part, table)


def _mask_of(config: MagnitudeMaskConfig, candidates: list[Candidate], quantised: bool) -> Mask:
    if config.mask_fingerprint is not None:
        return recover_mask(
            candidates,
            config.rule,
            dtype=str(config.mask_dtype),
            ties=config.mask_ties or {},
            fingerprint=config.mask_fingerprint,
        )
    return make_mask(candidates, config.rule, tell_ties=not quantised)  # of a few levels a large share would be ties


def _trained_parameters(layer: nn.Module, config: MagnitudeMaskConfig) -> list[str]:
    if is_quantised(layer):
        return ["weight", "bias"] if config.include_bias and layer.bias is not None else ["weight"]
    weight = getattr(layer, "weight", None)
    return parameter_names(layer, bias=config.include_bias or (isinstance(weight, Tensor) and weight.dim() == 1))


def _numbers(name: str, layer: nn.Module, parameter: str) -> Tensor | Callable[[], Tensor]:
    if parameter == "weight" and is_quantised(layer):
        return partial(dequantised_weight, name, layer)
    numbers: Tensor = getattr(layer, parameter)
    return numbers


def _padding(layer: nn.Module, parameter: str) -> int | None:
    return layer.padding_idx if isinstance(layer, nn.Embedding) and parameter == "weight" else None


def _start(config: MagnitudeMaskConfig, candidates: list[Candidate], mask: Mask) -> Tensor:
    """Starting values: zero, or normal with the root mean square of their parameter."""
    device = candidates[0].device
    if config.init_weights or config.inference_mode:
        return torch.zeros(sum(len(each) for each in mask.indices), device=device)
    drawn = [
        torch.randn(len(indices)) * float(candidate.read().float().square().mean().sqrt())
        for candidate, indices in zip(candidates, mask.indices, strict=True)
    ]
    return torch.cat(drawn).to(device)


register("magnitude_mask", MagnitudeMaskConfig, MagnitudeMaskModel)
