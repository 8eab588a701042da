"""A module with magnitude-masked values in its parameters."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..base.peft_private import BaseTunerLayer
from ..in_place.autograd import Change
from ..in_place.flat_indices import FlatIndices
from ..in_place.layer import InPlaceLayer
from ..in_place.table import DeltaTable
from ..in_place.version import TensorVersion
from .joint_switch import JointSwitch, WrittenPart


class MagnitudeMaskModule(BaseTunerLayer):
    """What PEFT visits when it sets, enables or deletes an adapter: the layers and the table."""


class ValueTable(DeltaTable, MagnitudeMaskModule):
    """The trained values of all layers, ``magnitude_mask_values.<adapter>.weight [n]``: what is saved."""

    state_name = "magnitude_mask_values"
    adapter_layer_names = ("magnitude_mask_values",)

    def __init__(self) -> None:
        super().__init__()
        self.joint_switch = JointSwitch()

    def add(self, adapter_name: str, vector: Tensor, sizes: Sequence[int], rounding: torch.dtype | None = None) -> None:
        """Add an adapter; see :meth:`DeltaTable.add`."""
        super().add(adapter_name, vector, sizes, rounding)
        self.joint_switch.forget_plans()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter."""
        super().delete_adapter(adapter_name)
        self.joint_switch.forget_plans()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the layers: those of a copy register themselves."""
        return {**self.__dict__, "joint_switch": JointSwitch()}


@dataclass(frozen=True)
class MaskedParameter:
    """What one adapter trains in one parameter.

    Attributes:
        name: of the parameter in its module.
        indices: of the elements that are trained.
        part: which part of the adapter's vector they take.
    """

    name: str
    indices: FlatIndices
    part: int


class ModuleMask(nn.Module):
    """The mask of one adapter in one module: the parameters with trained elements. It has no tensors of its own."""

    def __init__(self, parameters: tuple[MaskedParameter, ...]) -> None:
        super().__init__()
        self.masked = parameters

    def extra_repr(self) -> str:
        """Number of trained elements, by parameter."""
        return ", ".join(f"{each.name}: {len(each.indices)}" for each in self.masked)


class MagnitudeMaskLayer(InPlaceLayer, MagnitudeMaskModule):
    """One module and the masks of its adapters. The values are in the :class:`ValueTable` at the model's root."""

    magnitude_mask_masks: MutableMapping[str, ModuleMask]
    adapter_layer_names = ("magnitude_mask_masks",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.add_module("magnitude_mask_masks", nn.ModuleDict())

    def add(self, adapter_name: str, mask: ModuleMask, table: ValueTable) -> None:
        """Add an adapter."""
        self.join(table)
        self.magnitude_mask_masks[adapter_name] = mask
        self.set_adapter(self.active_adapters)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters. Masks have nothing to train or freeze, so the walk skips them."""
        self._use.guard.note_switch()
        self._active_adapter = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._note_set_adapter()

    def _sync_all_layers(self) -> bool:
        """Switch all layers at once, if this layer wants a single adapter that it does not hold yet."""
        wanted = self._wanted()
        if self.merged or len(wanted) != 1:
            return False
        table, name = self.table, wanted[0]
        assert isinstance(table, ValueTable)
        if self.serves(((name, table.version(name)),)):
            return False
        if table.joint_switch.write(table, name):
            return True
        table.joint_switch.enter(self)
        return False

    def wants_only(self, adapter_name: str) -> bool:
        """Whether the next forward pass needs this adapter, unmerged, and no other."""
        return self._active_adapter in ([adapter_name], adapter_name) and not (
            self._disable_adapters or self.merged_adapters
        )

    def written_parts(self, adapter_name: str) -> list[WrittenPart]:
        """The parameters that an adapter changes: where, and with which part of its values."""
        masked = self.magnitude_mask_masks[adapter_name].masked
        return [WrittenPart(self._overrides[each.name], each.indices, each.part) for each in masked]

    def has(self, adapter_name: str) -> bool:
        """Whether the adapter trains an element of this module."""
        mask = self._modules["magnitude_mask_masks"]._modules.get(adapter_name)  # type: ignore[union-attr]
        return mask is not None and bool(mask.masked)

    def version(self, adapter_name: str) -> TensorVersion:
        """Of the adapter's values."""
        return self.table.version(adapter_name)

    def adapted_parameters(self, adapter_name: str) -> list[str]:
        """Names of the parameters that the adapter changes here."""
        return [each.name for each in self.magnitude_mask_masks[adapter_name].masked]

    def changes(self, adapter_name: str) -> list[Change]:
        """The adapter's values in this module."""
        vector = self.table[adapter_name]
        masked = self.magnitude_mask_masks[adapter_name].masked
        return [Change(each.name, each.indices, vector.part(each.part)) for each in masked]

    def indices(self, adapter_name: str) -> dict[str, FlatIndices]:
        """The adapter's mask in this module."""
        return {each.name: each.indices for each in self.magnitude_mask_masks[adapter_name].masked}
