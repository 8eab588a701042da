"""Switch all layers of a model at once, from one adapter to another with the same mask.

The base's original values under the mask are gathered in one tensor, in the order of the adapter's values, so that one
addition serves the whole model. Each layer then only copies its part into its parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from ..in_place.flat_indices import FlatIndices
from ..in_place.override import Override, combined, writing
from ..in_place.table import DeltaTable
from ..in_place.version import Served


@dataclass(frozen=True)
class WrittenPart:
    """One parameter that an adapter changes.

    Attributes:
        override: of the parameter.
        indices: which of its elements.
        part: which part of the adapter's vector they take.
    """

    override: Override
    indices: FlatIndices
    part: int


class SwitchableLayer(Protocol):
    """What a layer must provide; see :class:`~peft_xmask.tuners.magnitude_mask.layer.MagnitudeMaskLayer`."""

    @property
    def in_use_by_others(self) -> bool:
        """Whether another thread is inside the layer's forward pass."""

    def has(self, adapter_name: str) -> bool:
        """Whether the adapter trains an element of the layer's module."""

    def wants_only(self, adapter_name: str) -> bool:
        """Whether the next forward pass needs this adapter, unmerged, and no other."""

    def written_parts(self, adapter_name: str) -> list[WrittenPart]:
        """The parameters that the adapter changes."""

    def all_overrides(self) -> list[Override]:
        """The overrides of all parameters of the module."""

    def serves(self, wanted: Served) -> bool:
        """Whether the parameters hold these adapters at these versions."""

    def note_served(self, served: Served) -> None:
        """Record what the parameters hold now."""


@dataclass(frozen=True)
class _LayerPlan:
    """What an adapter writes in one layer, and what it leaves alone."""

    layer: SwitchableLayer
    parts: Sequence[WrittenPart]
    others: Sequence[Override]

    def ready(self, adapter_name: str) -> bool:
        """Whether the layer needs this adapter alone, and now holds one with the same mask."""
        return (
            self.layer.wants_only(adapter_name)
            and all(each.override.holds(each.indices.index) for each in self.parts)
            and not any(override.written for override in self.others)
        )


class JointSwitch:
    """The layers of one model that were written one by one, and their plans by adapter."""

    def __init__(self) -> None:
        self._layers: dict[int, ReferenceType[SwitchableLayer]] = {}
        self._plans: dict[str, list[_LayerPlan]] = {}
        self._own: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def enter(self, layer: SwitchableLayer) -> None:
        """Register a layer."""
        known = self._layers.get(id(layer))
        if known is None or known() is not layer:
            self._layers[id(layer)] = ref(layer)
            self._plans.clear()

    def forget_plans(self) -> None:
        """Discard all plans. Call this when adapters are added or deleted."""
        self._plans.clear()

    def write(self, table: DeltaTable, adapter_name: str) -> bool:
        """Write this adapter, which has to be the only active one, into every layer. The model's guard is held.

        Returns:
            Whether it was written. False if a layer holds an adapter with another mask, wants another adapter, or is in
            use by another thread: nothing has been changed then, and each layer has to be written on its own.

        Raises:
            BaseMismatchError: other code changed the base's parameters. Nothing is written in that case.
        """
        plan = self._plan(table, adapter_name)
        if not plan or not all(each.ready(adapter_name) for each in plan):
            return False
        sizes = table[adapter_name].sizes
        found = self._gather(plan, sizes)
        if found is None:
            return False
        flat, own = found
        wanted = ((adapter_name, table.version(adapter_name)),)
        late = [each for each in plan if not each.layer.serves(wanted)]
        if any(each.layer.in_use_by_others for each in late):
            return False
        with writing():
            for each in late:
                for part in each.parts:
                    part.override.check()
            written = combined(flat, table[adapter_name].whole()).split(sizes)
            for each in late:
                for part in each.parts:
                    part.override.rewrite(own[part.part], written[part.part])
                each.layer.note_served(wanted)
        return True

    def _plan(self, table: DeltaTable, adapter_name: str) -> list[_LayerPlan]:
        """The adapter's plan, layer by layer; empty if not all of its layers are known."""
        if adapter_name not in self._plans:
            plan = []
            for known in self._layers.values():
                layer = known()
                if layer is not None and layer.has(adapter_name):
                    parts = layer.written_parts(adapter_name)
                    mine = [part.override for part in parts]
                    plan.append(_LayerPlan(layer, parts, [each for each in layer.all_overrides() if each not in mine]))
            covered = sum(len(part.indices) for each in plan for part in each.parts)
            self._plans[adapter_name] = plan if covered == sum(table[adapter_name].sizes) else []
        return self._plans[adapter_name]

    def _gather(self, plan: list[_LayerPlan], sizes: Sequence[int]) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The base's original values under the mask, as one tensor and in parts; None for several dtypes or devices."""
        parts = {part.part: part.override.own for each in plan for part in each.parts}
        if self._own is not None and all(part is self._own[1][index] for index, part in parts.items()):
            return self._own
        if len({(part.dtype, part.device) for part in parts.values()}) != 1:
            return None
        flat = torch.cat([parts[index] for index in sorted(parts)])
        self._own = flat, flat.split(list(sizes))
        return self._own
