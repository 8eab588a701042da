"""A module with magnitude-masked values in its parameters."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass

from torch import nn

from .._peft import BaseTunerLayer
from ..delta_table import DeltaTable, Stamp
from ..gathered import Change, Places
from ..in_place import InPlaceLayer


class MagnitudeMaskModule(BaseTunerLayer):
    """What PEFT visits when it sets, enables or deletes an adapter: the layers and the table."""


class ValueTable(DeltaTable, MagnitudeMaskModule):
    """The trained values of all layers, ``magnitude_mask_values.<adapter>.weight [n]``: what is saved."""

    state_name = "magnitude_mask_values"
    adapter_layer_names = ("magnitude_mask_values",)


@dataclass(frozen=True)
class Part:
    """What one adapter has in one parameter.

    Attributes:
        name: of the parameter in its module.
        places: that are trained.
        index: of the adapter's part in the table.
    """

    name: str
    places: Places
    index: int


class Share(nn.Module):
    """What one adapter has in one module: its parts, none of which is empty. No tensors of its own."""

    def __init__(self, parts: tuple[Part, ...]) -> None:
        super().__init__()
        self.parts = parts

    def extra_repr(self) -> str:
        """Trained numbers by parameter."""
        return ", ".join(f"{part.name}: {len(part.places)}" for part in self.parts)


class MagnitudeMaskLayer(InPlaceLayer, MagnitudeMaskModule):
    """One module and the masks of its adapters. The values are in the :class:`ValueTable` at the model's root."""

    magnitude_mask_shares: MutableMapping[str, Share]
    adapter_layer_names = ("magnitude_mask_shares",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.add_module("magnitude_mask_shares", nn.ModuleDict())
        self._table: tuple[DeltaTable, ...] = ()

    def add(self, adapter_name: str, share: Share, table: DeltaTable) -> None:
        """Enter an adapter. ``table`` is held in a tuple: it belongs to the root, not to this module."""
        self._table = (table,)
        self.magnitude_mask_shares[adapter_name] = share
        self.set_adapter(self.active_adapters)

    def has(self, adapter_name: str) -> bool:
        """Whether the adapter trains a number of this module."""
        return adapter_name in self.magnitude_mask_shares and bool(self.magnitude_mask_shares[adapter_name].parts)

    def stamp(self, adapter_name: str) -> Stamp:
        """Of the adapter's values."""
        return self._table[0].stamp(adapter_name)

    def changes(self, adapter_name: str) -> list[Change]:
        """The adapter's values in this module."""
        table = self._table[0]
        return [
            Change(part.name, part.places, table.part(adapter_name, part.index))
            for part in self.magnitude_mask_shares[adapter_name].parts
        ]

    def places(self, adapter_name: str) -> dict[str, Places]:
        """The adapter's mask in this module."""
        return {part.name: part.places for part in self.magnitude_mask_shares[adapter_name].parts}
