"""All layers of a model brought in line at once, where they go from one adapter to another of the same mask.

The base's own numbers of the mask lie in one tensor then, in the order of the values, so that there is one sum for the
whole model. What is left for each layer is to put its part in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from ..in_place.override import Override, combined, writing
from ..in_place.sparse_gradients import Places

if TYPE_CHECKING:
    from .layer import MagnitudeMaskLayer, ValueTable

Written = tuple[Override, Places, int]
"""A parameter of a layer, where it is written, and which part of the adapter's values is."""
Plan = list[tuple["MagnitudeMaskLayer", list[Written], list[Override]]]
"""Layer by layer, what an adapter writes, and what it leaves alone."""


class Together:
    """Layers that have been written one by one, and what is known about them."""

    def __init__(self) -> None:
        self._layers: dict[int, ReferenceType[MagnitudeMaskLayer]] = {}
        self._plans: dict[str, Plan] = {}
        self._own: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def enter(self, layer: MagnitudeMaskLayer) -> None:
        """Have a layer take part from now on."""
        known = self._layers.get(id(layer))
        if known is None or known() is not layer:
            self._layers[id(layer)] = ref(layer)
            self._plans.clear()

    def forget_plans(self) -> None:
        """To be called when adapters come or go."""
        self._plans.clear()

    def write(self, table: ValueTable, adapter_name: str) -> bool:
        """Let every layer's parameters be what this one active adapter wants, if the last one had the same mask.

        Returns:
            Whether that was possible. If not, nothing has been changed, and each layer has to do it on its own.

        Raises:
            BaseMismatchError: somebody changed the base's parameters; nothing has been changed then either.
        """
        plan = self._plan(table, adapter_name)
        if not plan or not _ready(plan, adapter_name):
            return False
        sizes = table.sizes(adapter_name)
        found = self._gather(plan, sizes)
        if found is None:
            return False
        flat, own = found
        wanted = ((adapter_name, table.stamp(adapter_name)),)
        with writing():
            late = [entry for entry in plan if not entry[0].serves(wanted)]
            for _, parts, _ in late:
                for override, _, _ in parts:
                    override.check()
            written = combined(flat, table.whole(adapter_name)).split(sizes)
            for layer, parts, _ in late:
                for override, _, index in parts:
                    override.rewrite(own[index], written[index])
                layer.note_served(wanted)
        return True

    def _plan(self, table: ValueTable, adapter_name: str) -> Plan:
        """The adapter's plan; empty if not all of it is known."""
        if adapter_name not in self._plans:
            plan = []
            for known in self._layers.values():
                layer = known()
                if layer is not None and layer.has(adapter_name):
                    changed = layer.overrides(adapter_name)
                    mine = [override for override, _, _ in changed]
                    plan.append((layer, changed, [each for each in layer.all_overrides() if each not in mine]))
            covered = sum(len(places) for _, changed, _ in plan for _, places, _ in changed)
            self._plans[adapter_name] = plan if covered == sum(table.sizes(adapter_name)) else []
        return self._plans[adapter_name]

    def _gather(self, plan: Plan, sizes: tuple[int, ...]) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The base's own numbers of the mask, as one and in parts; None if they have several dtypes or devices."""
        parts = {index: override.own for _, changed, _ in plan for override, _, index in changed}
        if self._own is not None and all(part is self._own[1][index] for index, part in parts.items()):
            return self._own
        if len({(part.dtype, part.device) for part in parts.values()}) != 1:
            return None
        flat = torch.cat([parts[index] for index in sorted(parts)])
        self._own = flat, flat.split(sizes)
        return self._own


def _ready(plan: Plan, adapter_name: str) -> bool:
    """Whether all layers are to serve this adapter alone, and hold one of the same mask."""
    for layer, parts, others in plan:
        if not layer.wants_only(adapter_name):
            return False
        for override, places, _ in parts:
            if not override.holds(places.index):
                return False
        for override in others:
            if override.written:
                return False
    return True
