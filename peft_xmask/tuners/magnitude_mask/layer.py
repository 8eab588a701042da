"""A module with magnitude-masked values in its parameters."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..base.peft_private import BaseTunerLayer
from ..in_place.layer import InPlaceLayer
from ..in_place.override import Override
from ..in_place.sparse_gradients import Change, Places
from ..in_place.table import DeltaTable, Stamp
from .together import Together


class MagnitudeMaskModule(BaseTunerLayer):
    """What PEFT visits when it sets, enables or deletes an adapter: the layers and the table."""


class ValueTable(DeltaTable, MagnitudeMaskModule):
    """The trained values of all layers, ``magnitude_mask_values.<adapter>.weight [n]``: what is saved."""

    state_name = "magnitude_mask_values"
    adapter_layer_names = ("magnitude_mask_values",)

    def __init__(self) -> None:
        super().__init__()
        self.together = Together()

    def add(self, adapter_name: str, vector: Tensor, sizes: Sequence[int], rounding: torch.dtype | None = None) -> None:
        """Enter an adapter; see :meth:`DeltaTable.add`."""
        super().add(adapter_name, vector, sizes, rounding)
        self.together.forget_plans()

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter."""
        super().delete_adapter(adapter_name)
        self.together.forget_plans()

    def __getstate__(self) -> dict[str, Any]:
        """Without the layers: those of a copy enter themselves."""
        return {**super().__getstate__(), "together": Together()}


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
        self._table: tuple[ValueTable, ...] = ()

    def add(self, adapter_name: str, share: Share, table: ValueTable) -> None:
        """Enter an adapter. ``table`` is held in a tuple: it belongs to the root, not to this module."""
        self._table = (table,)
        self.magnitude_mask_shares[adapter_name] = share
        self.set_adapter(self.active_adapters)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters. Shares have nothing to train or to freeze, so none of them is visited."""
        self._active_adapter = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._note_set_adapter()

    def bring_in_line(self) -> None:
        """Let the parameters be what the next forward pass needs; of all layers at once where that can be."""
        names = self._serving()
        if self.merged or len(names) != 1:
            super().bring_in_line()
            return
        table, name = self._table[0], names[0]
        if not self.serves(((name, table.stamp(name)),)) and not table.together.write(table, name):
            super().bring_in_line()
            table.together.enter(self)

    def wants_only(self, adapter_name: str) -> bool:
        """Whether the next forward pass is to serve this adapter, unmerged, and no other."""
        return self._active_adapter in ([adapter_name], adapter_name) and not (
            self._disable_adapters or self.merged_adapters
        )

    def overrides(self, adapter_name: str) -> list[tuple[Override, Places, int]]:
        """The parameters that an adapter changes: where, and with which part of its values."""
        parts = self.magnitude_mask_shares[adapter_name].parts
        return [(self._overrides[part.name], part.places, part.index) for part in parts]

    def has(self, adapter_name: str) -> bool:
        """Whether the adapter trains a number of this module."""
        share = self._modules["magnitude_mask_shares"]._modules.get(adapter_name)  # type: ignore[union-attr]
        return share is not None and bool(share.parts)

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
