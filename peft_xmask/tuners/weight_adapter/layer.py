"""A module with weight adapters in its parameters."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..base.peft_private import BaseTunerLayer
from ..base.state import PackedTensor, TrainableTensor, lazy_zeros
from ..in_place.autograd import Change, TrainedChange
from ..in_place.layer import InPlaceLayer
from ..in_place.rows import Rows, rows_of
from ..in_place.table import DeltaTable, refuse_non_finite
from ..in_place.version import TensorVersion, TensorVersions
from .product import Product, Start, drawn_dropout

PARAMETERS = ("bias", "weight")
FACTORS = ("down", "up", "shift")


class WeightAdapterModule(BaseTunerLayer):
    """What PEFT visits when it sets, enables or deletes an adapter: the layers and the table."""


class StoredChange(PackedTensor):
    """The stored change of one adapter. While it is all zero it may be a single number, expanded, which takes no room.

    A state dict always has the whole tensor, because savers refuse tensors that share memory with themselves.
    """

    @classmethod
    def zeros(cls, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zeros that take no room, ``[count]``."""
        return torch.zeros(1, dtype=dtype, device=device).expand(count)

    def _make_room(self) -> None:
        if self.weight.numel() > 1 and self.weight.stride() == (0,):
            self.weight = lazy_zeros(*self.weight.shape, dtype=self.weight.dtype, device=self.weight.device)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        small = self.weight
        self._make_room()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self.weight = small

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}weight" in state_dict:
            self._make_room()
        super()._load_from_state_dict(state_dict, prefix, *args)


class ResultTable(DeltaTable, WeightAdapterModule):
    """The stored changes of all layers, ``weight_adapter_delta.<adapter>.weight [n]``: what is saved.

    A buffer: of an adapter that is being trained, what it started from, on top of which its layers train.
    """

    state_name = "weight_adapter_delta"
    adapter_layer_names = ("weight_adapter_delta",)
    holder_cls = StoredChange


@dataclass(frozen=True)
class AdaptedParameter:
    """What one adapter has in one parameter.

    Attributes:
        name: of the parameter in its module.
        part: which part of the adapter's vector in the table is its change.
        start: of its factors.
    """

    name: str
    part: int
    start: Start


class ModuleAdapter(nn.Module):
    """What one adapter has in one module, except for its tensors.

    Attributes:
        adapted: one entry for each adapted parameter.
        trained: whether there are factors.
        activation, scale: of the adapter.
    """

    def __init__(self, adapted: Sequence[AdaptedParameter], *, trained: bool, activation: str, scale: float) -> None:
        super().__init__()
        self.adapted = tuple(adapted)
        self.trained, self.activation, self.scale = trained, activation, scale

    def extra_repr(self) -> str:
        """Names of the parameters."""
        return ", ".join(each.name for each in self.adapted)


def _holders_of(parameters: Iterable[str]) -> tuple[str, ...]:
    """Names of the modules that hold the factors of these parameters."""
    return tuple(f"weight_adapter_{parameter}_{factor}" for parameter in parameters for factor in FACTORS)


class WeightAdapterLayer(InPlaceLayer, WeightAdapterModule):
    """One module and the adapters over its bias, its weight or both.

    State, of adapters that are trained: ``weight_adapter_<parameter>_down.<adapter>.weight [d, r]``, ``..._up [r, d]``
    and, where there is one, ``..._shift [r]``.
    """

    weight_adapter_adapted: MutableMapping[str, ModuleAdapter]
    weight_adapter_dropout: MutableMapping[str, nn.Dropout]
    adapter_layer_names = (
        "weight_adapter_adapted",
        *_holders_of(PARAMETERS),
    )
    other_param_names = ("weight_adapter_dropout",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        own = [name for name in self._overrides if name not in PARAMETERS]  # of fused experts
        self.adapter_layer_names = (*type(self).adapter_layer_names, *_holders_of(own))
        for name in (*self.adapter_layer_names, *self.other_param_names):
            self.add_module(name, nn.ModuleDict())
        self._versions: dict[str, TensorVersions] = {}
        self._kept: dict[tuple[str, str], Tensor] = {}
        self._merging = False

    def add(self, adapter_name: str, adapter: ModuleAdapter, table: DeltaTable, dropout: float) -> None:
        """Add an adapter."""
        self.join(table)
        self.weight_adapter_adapted[adapter_name] = adapter
        if adapter.trained:
            self.weight_adapter_dropout[adapter_name] = nn.Dropout(dropout)
            for key, tensor in self.fresh_factors(adapter_name).items():
                getattr(self, key)[adapter_name] = TrainableTensor(tensor)
        self.set_adapter(self.active_adapters)

    def fresh_factors(self, adapter_name: str, *, at_base: bool = False) -> dict[str, Tensor]:
        """Starting values of an adapter's factors, by the name of the module that holds them.

        Args:
            at_base: let the change start at zero, whatever the config says.
        """
        found = {}
        for each in self.weight_adapter_adapted[adapter_name].adapted:
            start = each.start if not at_base else Start(each.start.r, each.start.has_shift)
            drawn = start.draw(self._overrides[each.name].own, self._rows(each))
            for factor, tensor in zip(FACTORS, drawn, strict=True):
                if tensor is not None:
                    found[f"weight_adapter_{each.name}_{factor}"] = tensor
        return found

    def factors(self, adapter_name: str) -> dict[str, Tensor]:
        """The adapter's trainable tensors here, by their modules' names; empty if it was loaded for inference."""
        return {name: each.weight for name, each in self._holders(adapter_name).items()}

    def _holders(self, adapter_name: str) -> dict[str, TrainableTensor]:
        found = {name: getattr(self, name) for name in self.adapter_layer_names[1:]}
        return {name: each[adapter_name] for name, each in found.items() if adapter_name in each}

    def has(self, adapter_name: str) -> bool:
        """Whether the adapter changes this module."""
        return adapter_name in self.weight_adapter_adapted

    def version(self, adapter_name: str) -> TensorVersion:
        """Of what the adapter trains here, and of what is stored of it.

        Raises:
            FileFormatError: in eval mode, a value is not finite.
        """
        stored = self.table.version(adapter_name)
        version = self._versions.get(adapter_name)
        if version is None or version.first is not stored or not version.is_current():
            holders = self._holders(adapter_name)
            for each in holders.values() if not self.training else ():
                refuse_non_finite(adapter_name, each.weight)
            trained = [TensorVersion(each) for each in holders.values()]
            version = self._versions[adapter_name] = TensorVersions(stored, trained)
        return version

    def adapted_parameters(self, adapter_name: str) -> list[str]:
        """Names of the parameters that the adapter changes here."""
        return [each.name for each in self.weight_adapter_adapted[adapter_name].adapted]

    def changes(self, adapter_name: str) -> list[Change]:
        """What the adapter adds to each parameter as a whole."""
        return [
            Change(each.name, None, self._delta(adapter_name, each, self._dropout(adapter_name, each)))
            for each in self.weight_adapter_adapted[adapter_name].adapted
        ]

    def trained_changes(self, adapter_name: str) -> Sequence[TrainedChange]:
        """What the adapter trains in this module.

        The changes have been computed when they were written. They are not computed again for their gradients, except
        by a graph, which cannot keep them.
        """
        if torch.compiler.is_compiling():
            return super().trained_changes(adapter_name)
        if not any(each.requires_grad for each in self.factors(adapter_name).values()):
            return []
        adapted = self.weight_adapter_adapted[adapter_name].adapted
        return [self._product(adapter_name, each, self._dropout(adapter_name, each)) for each in adapted]

    def result(self, adapter_name: str) -> list[tuple[int, Tensor]]:
        """What is saved of an adapter, without dropout: its parts of the vector, with their numbers, and the changes.

        Raises:
            FileFormatError: a value is not finite.
        """
        found = []
        with torch.no_grad():
            for each in self.weight_adapter_adapted[adapter_name].adapted:
                found.append((each.part, self._delta(adapter_name, each, None)))
                refuse_non_finite(adapter_name, found[-1][1])
        return found

    def _delta(self, adapter_name: str, parameter: AdaptedParameter, kept: Tensor | None) -> Tensor:
        shape = self._overrides[parameter.name].own.shape
        vector = self.table[adapter_name]
        stored = vector.part(parameter.part)
        if not self.weight_adapter_adapted[adapter_name].trained:
            return stored.float().view(shape)
        change = self._product(adapter_name, parameter, kept).value()
        return vector.rounded(stored.to(change.device, torch.float32).view(shape) + change)

    def _product(self, adapter_name: str, parameter: AdaptedParameter, kept: Tensor | None) -> Product:
        adapter = self.weight_adapter_adapted[adapter_name]
        found = self.factors(adapter_name)
        down, up = (found[f"weight_adapter_{parameter.name}_{factor}"] for factor in FACTORS[:2])
        shift = found.get(f"weight_adapter_{parameter.name}_shift")
        own = self._overrides[parameter.name].own.detach()
        return Product(
            parameter.name,
            own,
            down,
            up,
            shift,
            adapter.activation,
            adapter.scale,
            self._rows(parameter),
            kept,
        )

    def _dropout(self, adapter_name: str, parameter: AdaptedParameter) -> Tensor | None:
        """Factors of dropout: drawn when the change is written, and the same until it is written again."""
        if adapter_name not in self.weight_adapter_dropout:
            return None
        module = self.weight_adapter_dropout[adapter_name]
        if not module.training or module.p == 0.0 or self.merged or self._merging:
            return None
        key = (adapter_name, parameter.name)
        if not torch.is_grad_enabled() or key not in self._kept:
            own, width = self._overrides[parameter.name].own, parameter.start.r
            self._kept[key] = drawn_dropout(own, width, self._rows(parameter), module.p)
        return self._kept[key]

    def _rows(self, parameter: AdaptedParameter) -> Rows:
        return rows_of(self.get_base_layer(), parameter.name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """The base's state dict and the adapters', without dropout."""
        self._merging = True
        try:
            super().merge(safe_merge, adapter_names)
        finally:
            self._merging = False

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter."""
        super().delete_adapter(adapter_name)
        self._versions.pop(adapter_name, None)
        self._kept = {key: each for key, each in self._kept.items() if key[0] != adapter_name}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out caches, which a copy computes again."""
        return {**self.__dict__, "_versions": {}, "_kept": {}}
