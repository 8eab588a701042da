"""A module with weight adapters in its parameters."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from ...errors import FileFormatError
from ..base.peft_private import BaseTunerLayer
from ..base.state import PackedTensor, TrainableTensor
from ..in_place.layer import InPlaceLayer
from ..in_place.sparse_gradients import Change
from ..in_place.table import DeltaTable, Stamp
from .product import Product, Start, drawn_dropout, run_linear, standing_in

PARAMETERS = ("bias", "weight")
FACTORS = ("down", "up", "shift")


class WeightAdapterModule(BaseTunerLayer):
    """What PEFT visits when it sets, enables or deletes an adapter: the layers and the table."""


class ResultTable(DeltaTable, WeightAdapterModule):
    """The stored changes of all layers, ``weight_adapter_delta.<adapter>.weight [n]``: what is saved.

    A buffer: of an adapter that is being trained, what it started from, on top of which its layers train.
    """

    state_name = "weight_adapter_delta"
    adapter_layer_names = ("weight_adapter_delta",)
    holder_cls = PackedTensor


@dataclass(frozen=True)
class Part:
    """What one adapter has in one parameter.

    Attributes:
        name: of the parameter in its module.
        index: of the adapter's part in the table.
        start: of its factors.
    """

    name: str
    index: int
    start: Start


class Stamps(Stamp):
    """Several in one."""

    def __init__(self, first: Stamp, others: Sequence[Stamp]) -> None:
        self.first = first
        self._all = (first, *others)

    def holds(self) -> bool:
        """Whether all of them do."""
        return all(stamp.holds() for stamp in self._all)


class Share(nn.Module):
    """What one adapter has in one module, but for its tensors.

    Attributes:
        parts: one for each parameter.
        trained: whether there are factors.
        activation, scale: of the adapter.
    """

    def __init__(self, parts: Sequence[Part], *, trained: bool, activation: str, scale: float) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.trained, self.activation, self.scale = trained, activation, scale

    def extra_repr(self) -> str:
        """Names of the parameters."""
        return ", ".join(part.name for part in self.parts)


class WeightAdapterLayer(InPlaceLayer, WeightAdapterModule):
    """One module and the adapters over its bias, its weight or both.

    State, of adapters that are trained: ``weight_adapter_<parameter>_down.<adapter>.weight [d, r]``, ``..._up [r, d]``
    and, where there is one, ``..._shift [r]``.
    """

    weight_adapter_shares: MutableMapping[str, Share]
    weight_adapter_dropout: MutableMapping[str, nn.Dropout]
    adapter_layer_names = (
        "weight_adapter_shares",
        *(f"weight_adapter_{parameter}_{factor}" for parameter in PARAMETERS for factor in FACTORS),
    )
    other_param_names = ("weight_adapter_dropout",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        for name in (*self.adapter_layer_names, *self.other_param_names):
            self.add_module(name, nn.ModuleDict())
        self._table: tuple[DeltaTable, ...] = ()
        self._stamps: dict[str, Stamps] = {}
        self._kept: dict[tuple[str, str], Tensor] = {}
        self._merging = False

    def add(self, adapter_name: str, share: Share, table: DeltaTable, dropout: float) -> None:
        """Enter an adapter. ``table`` is held in a tuple: it belongs to the root, not to this module."""
        self._table = (table,)
        self.weight_adapter_shares[adapter_name] = share
        if share.trained:
            self.weight_adapter_dropout[adapter_name] = nn.Dropout(dropout)
            for key, tensor in self.fresh_factors(adapter_name).items():
                getattr(self, key)[adapter_name] = TrainableTensor(tensor)
        self.set_adapter(self.active_adapters)

    def fresh_factors(self, adapter_name: str, *, at_base: bool = False) -> dict[str, Tensor]:
        """Where an adapter's factors start, by the name of what holds them.

        Args:
            at_base: let the change start at zero, whatever the config says.
        """
        found = {}
        for part in self.weight_adapter_shares[adapter_name].parts:
            start = part.start if not at_base else Start(part.start.r, part.start.has_shift)
            drawn = start.draw(self._overrides[part.name].own, self._turned(part))
            for factor, tensor in zip(FACTORS, drawn, strict=True):
                if tensor is not None:
                    found[f"weight_adapter_{part.name}_{factor}"] = tensor
        return found

    def factors(self, adapter_name: str) -> dict[str, Tensor]:
        """What an adapter trains here, by the name of what holds it; empty if it was loaded for inference."""
        return {name: each.weight for name, each in self._holders(adapter_name).items()}

    def _holders(self, adapter_name: str) -> dict[str, TrainableTensor]:
        found = {name: getattr(self, name) for name in self.adapter_layer_names[1:]}
        return {name: each[adapter_name] for name, each in found.items() if adapter_name in each}

    def has(self, adapter_name: str) -> bool:
        """Whether the adapter changes this module."""
        return adapter_name in self.weight_adapter_shares

    def stamp(self, adapter_name: str) -> Stamp:
        """Of what the adapter trains here, and of what is stored of it.

        Raises:
            FileFormatError: in eval mode, a number that is not finite.
        """
        stored = self._table[0].stamp(adapter_name)
        stamp = self._stamps.get(adapter_name)
        if stamp is None or stamp.first is not stored or not stamp.holds():
            holders = self._holders(adapter_name)
            for each in holders.values() if not self.training else ():
                _check_finite(adapter_name, each.weight)
            stamp = self._stamps[adapter_name] = Stamps(stored, [Stamp(each) for each in holders.values()])
        return stamp

    def changes(self, adapter_name: str) -> list[Change]:
        """What the adapter adds to each parameter as a whole."""
        return [
            Change(part.name, None, self._delta(adapter_name, part, self._dropout(adapter_name, part)))
            for part in self.weight_adapter_shares[adapter_name].parts
        ]

    def result(self, adapter_name: str) -> list[tuple[int, Tensor]]:
        """What is saved of an adapter, without dropout: index in the table and change, float32.

        Raises:
            FileFormatError: a number is not finite.
        """
        found = []
        with torch.no_grad():
            for part in self.weight_adapter_shares[adapter_name].parts:
                found.append((part.index, self._delta(adapter_name, part, None)))
                _check_finite(adapter_name, found[-1][1])
        return found

    def _delta(self, adapter_name: str, part: Part, kept: Tensor | None) -> Tensor:
        shape = self._overrides[part.name].own.shape
        table = self._table[0]
        stored = table.part(adapter_name, part.index)
        if not self.weight_adapter_shares[adapter_name].trained:
            return stored.float().view(shape)
        change = self._product(adapter_name, part, kept).value()
        return table.rounded(adapter_name, stored.to(change.device, torch.float32).view(shape) + change)

    def _product(self, adapter_name: str, part: Part, kept: Tensor | None) -> Product:
        share = self.weight_adapter_shares[adapter_name]
        found = self.factors(adapter_name)
        down, up = (found[f"weight_adapter_{part.name}_{factor}"] for factor in FACTORS[:2])
        shift = found.get(f"weight_adapter_{part.name}_shift")
        own = self._overrides[part.name].own.detach()
        return Product(own, down, up, shift, share.activation, share.scale, self._turned(part), kept)

    def _dropout(self, adapter_name: str, part: Part) -> Tensor | None:
        """Factors of dropout: drawn when the change is written, and the same until it is written again."""
        if adapter_name not in self.weight_adapter_dropout:
            return None
        module = self.weight_adapter_dropout[adapter_name]
        if not module.training or module.p == 0.0 or self.merged or self._merging:
            return None
        key = (adapter_name, part.name)
        if not torch.is_grad_enabled() or key not in self._kept:
            self._kept[key] = drawn_dropout(self._overrides[part.name].own, part.start.r, self._turned(part), module.p)
        return self._kept[key]

    def _turned(self, part: Part) -> bool:
        return part.name == "weight" and isinstance(self.get_base_layer(), Conv1D)

    def _run(self, names: list[str], before_backward: Callable[[], None], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As its base's, but the changes are not computed again for the sake of their factors' gradients."""
        if torch.compiler.is_compiling():
            return super()._run(names, before_backward, x, *args, **kwargs)
        products = [
            (part.name, self._product(name, part, self._dropout(name, part)))
            for name in names
            if any(each.requires_grad for each in self.factors(name).values())
            for part in self.weight_adapter_shares[name].parts
        ]
        module: Any = self.base_layer
        if not (products or x.requires_grad):
            return module(x, *args, **kwargs)
        if _is_plain_linear(module) and not (args or kwargs):
            return run_linear(module, products, before_backward, x)
        stand_ins = {
            name: standing_in(getattr(module, name), [product for other, product in products if other == name])
            for name in dict.fromkeys(name for name, _ in products)
        }
        return functional_call(module, stand_ins, (x, *args), kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As its base's, without dropout."""
        self._merging = True
        try:
            super().merge(safe_merge, adapter_names)
        finally:
            self._merging = False

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter."""
        super().delete_adapter(adapter_name)
        self._stamps.pop(adapter_name, None)
        self._kept = {key: each for key, each in self._kept.items() if key[0] != adapter_name}

    def __getstate__(self) -> dict[str, Any]:
        """Without what a copy computes anew."""
        return {**self.__dict__, "_stamps": {}, "_kept": {}}


def _is_plain_linear(module: Any) -> bool:
    """Whether a module computes ``x W^T + b`` of frozen plain numbers."""
    if type(module) not in (nn.Linear, Conv1D) or any(each.requires_grad for each in module.parameters()):
        return False
    return type(module.weight) in (Tensor, nn.Parameter) and module.weight.is_floating_point()


def _check_finite(adapter_name: str, tensor: Tensor) -> None:
    if not tensor.is_meta and not tensor.isfinite().all():
        raise FileFormatError(
            f"Expected finite numbers in adapter '{adapter_name}', found NaN or infinity. Its training diverged: lower "
            "the learning rate, or go back to an earlier checkpoint."
        )
