"""The mask table: every mask of a model, in one place at its root, and which of them are in force."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...core.masks import require
from ...errors import ConfigError, MaskFormatError, PeftXMaskWarning
from ..base.state import PackedTensor
from .baked import BakedRows
from .mixing import Mixing, Site, Source
from .state import MaskState


class Names(Protocol):
    """Names of rows."""

    def find(self, name: str) -> int | None:
        """Row of a name; None if there is none."""


class MaskTable(MaskState):
    """Masks of all sites, profiles and adapters of one model, and those in force during a forward pass.

    Masks of all sites are computed together, once per forward pass.

    Attributes:
        names: of rows, by adapter.
        baked: by adapter, mixed adapters of rows that were used last, where they are to be kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self._warned: set[str] = set()
        self.names: dict[str, Names] = {}
        self.baked: dict[str, BakedRows] = {}
        self._rows: dict[str, int] = {}
        self._row_tensors: dict[str, Tensor] = {}
        self._batch_rows: Tensor | None = None
        self._beams = 1
        self._cache: dict[str, Mixing] = {}
        self._in_graph: dict[str, Mixing] = {}
        self._inbox: dict[str, tuple[Any, ...]] = {}
        self.hooks: list[RemovableHandle] = []

    def set_rows(self, adapter_name: str, row: int) -> None:
        """Choose the profile that serves whole batches. O(1).

        Raises:
            ConfigError: no such row.
        """
        count = self.specs[adapter_name].num_profiles
        if not 0 <= row < count:
            raise ConfigError(f"Row {row} is not in adapter '{adapter_name}', which has {count} profiles (from 0).")
        self._rows[adapter_name] = row
        self._row_tensors[adapter_name] = torch.tensor([row])

    def serve(self, adapter_name: str, bits: Tensor, gain_bits: Tensor | None, names: Names) -> None:
        """Let an adapter that is not trained have these bytes, and names for their rows. Nothing is copied.

        Shapes: ``bits [P, 2, S, W]``, ``gain_bits [P, S, 2]``, see :class:`~peft_xmask.tuners.xpeft.spec.MaskSpec`.
        """
        spec = replace(self.specs[adapter_name], num_profiles=len(bits))
        spec.check_shapes(bits, gain_bits)
        device = self.xpeft_bits[adapter_name].weight.device
        self.specs[adapter_name] = spec
        self.xpeft_bits[adapter_name] = PackedTensor(bits.to(device))
        if gain_bits is not None:
            self.xpeft_gain_bits[adapter_name] = PackedTensor(gain_bits.to(device))
        self.names[adapter_name] = names
        for note in (self._rows, self._row_tensors, self._cache):
            note.pop(adapter_name, None)
        if adapter_name in self.baked:
            self.baked[adapter_name].clear()

    def keep_baked(self, adapter_name: str, baked: BakedRows | None) -> None:
        """Keep mixed adapters of the rows used last from now on; None: no more."""
        self._cache.pop(adapter_name, None)
        self.baked.pop(adapter_name, None)
        if baked is not None:
            self.baked[adapter_name] = baked

    def find_rows(self, adapter_name: str, names: Sequence[str]) -> Tensor:
        """Rows of profiles by name, -1 for ``"__base__"``. Long, ``[len(names)]``.

        Raises:
            ConfigError: an unknown name, or an adapter whose profiles have none.
        """
        if adapter_name not in self.names:
            raise ConfigError(f"The profiles of adapter '{adapter_name}' have no names. Choose them by row.")
        rows = [-1 if name == "__base__" else self.names[adapter_name].find(name) for name in names]
        unknown = sorted({str(name) for name, row in zip(names, rows, strict=True) if row is None})
        if unknown:
            raise ConfigError(
                f"No such profiles in adapter '{adapter_name}', which has {self.specs[adapter_name].num_profiles}: "
                f"{', '.join(map(repr, unknown[:5]))}{' and others' if len(unknown) > 5 else ''}."
            )
        return torch.tensor(rows)

    def new_forward(self) -> None:
        """A forward pass begins: masks that depend on chance are drawn anew; a graph being compiled computes all."""
        if torch.compiler.is_compiling():
            in_use = [] if self.disable_adapters or self.merged else self.active_adapters
            self._in_graph = {name: self._mixing_in_graph(name) for name in in_use if name in self.specs}
        elif self.training:
            self._cache.clear()
            self._exploring = torch.is_grad_enabled()
            if self._exploring:
                self._noise.clear()

    def end_forward(self) -> None:
        """A forward pass is over: what its graph computed goes with it."""
        if torch.compiler.is_compiling():
            self._in_graph = {}

    def set_batch_rows(self, rows: Tensor | None, beams: int = 1) -> None:
        """One row for each example of the next batches; None: back to :meth:`set_rows`. Stays until set again."""
        self._batch_rows, self._beams = rows, beams

    def check_batch(self, *inputs: Any) -> None:
        """Refuse rows that are not one for each example of a batch (or for each prompt, whose beams are examples).

        Raises:
            ConfigError: no input has as many examples.
        """
        sizes = [x.shape[0] for x in inputs if isinstance(x, Tensor) and x.dim() > 0]
        if self._batch_rows is None or not sizes:
            return
        count = self._batch_rows.shape[0]
        if not any(size == count * self._beams for size in sizes):
            raise ConfigError(
                "Expected one row in `adapter_names` for each example of the batch, but got "
                f"{count} and {sizes[0] // self._beams} respectively."
            )

    def mixing(self, adapter_name: str, site: Site) -> Mixing:
        """The adapters in force now, their masks computed at most once per forward pass.

        Args:
            site: of the adapter, that is to use them.

        Raises:
            ConfigError: an adapter of several profiles, and none was chosen.
            MaskFormatError: bytes that were loaded, or logits that were trained, are no masks.
        """
        if torch.compiler.is_compiling():
            return self._in_graph.get(adapter_name) or self._mixing_in_graph(adapter_name)
        rows = self._active_rows(adapter_name)
        cached = self._cache.get(adapter_name)
        if cached is not None and self._holds(cached, adapter_name, rows) and cached.mixed.fit(site):
            return cached
        self._cache.pop(adapter_name, None)
        self._take_in(adapter_name)
        self._warn_of_frozen_masks(adapter_name)
        holders = [
            container[adapter_name]
            for container in (self.xpeft_logits, self.xpeft_gain, self.xpeft_bits, self.xpeft_gain_bits)
            if adapter_name in container
        ]
        sources: list[Source] = [(holder, holder.weight, *_form(holder.weight)) for holder in holders]
        state = self._state(adapter_name, [holder.weight for holder in holders])
        mixing = self._mixing(adapter_name, rows, sources)
        mixing.rows, mixing.sources, mixing.state = rows, sources, state
        self._cache[adapter_name] = mixing
        return mixing

    def _holds(self, cached: Mixing, name: str, rows: int | Tensor) -> bool:
        """Whether a mixing is still true: asked at every site of every forward pass, so it looks nothing up."""
        by_row = isinstance(rows, int) and isinstance(cached.rows, int)
        if cached.rows is not rows and not (by_row and cached.rows == rows):
            return False
        for holder, weight, version, dtype, device in cached.sources:
            if holder.weight is not weight or (version, dtype, device) != _form(weight):
                return False
        return cached.state == self._state(name, [weight for _, weight, *_ in cached.sources])

    def _state(self, name: str, weights: list[Tensor]) -> tuple[Any, ...]:
        inference = torch.is_inference_mode_enabled()  # its tensors cannot be saved for a backward pass
        noisy, graph = self._is_noisy(name), _makes_graph(weights)
        return self.training, graph, inference, noisy, self.temperature[name], self.logit_scale[name]

    def _mixing(self, name: str, rows: int | Tensor, sources: list[Source]) -> Mixing:
        if isinstance(rows, int):
            slots = self._slots_of(name, torch.tensor([rows]), sources)
            return Mixing(self.masks(name, rows) if slots is None else self.baked[name], slots, each=False)
        distinct, index = _distinct(rows)
        slots = self._slots_of(name, distinct, sources)
        if slots is None:
            return Mixing(self.masks(name, distinct), index, each=True)
        return Mixing(self.baked[name], slots if index is None else slots.to(index.device)[index], each=True)

    def _slots_of(self, name: str, rows: Tensor, sources: list[Source]) -> Tensor | None:
        """Where mixed adapters of distinct rows are kept; None if they are not. What trains is mixed in each pass."""
        weights = [weight for _, weight, *_ in sources]
        if name not in self.baked or self.training or _makes_graph(weights):
            return None
        return self.baked[name].find(
            rows,
            weights=weights,
            facts=(self.temperature[name], self.logit_scale[name], [form for _, _, *form in sources]),
            masks_of=lambda missing: self.masks(name, missing),
            num_rows=self.specs[name].num_profiles + 1,  # with that of none
        )

    def _mixing_in_graph(self, name: str) -> Mixing:
        """The masks in force, for ``torch.compile``.

        A graph cannot look at versions and values, so it computes the masks in each pass and asserts what is otherwise
        checked before. Rows are tensors: another profile is another input to the same graph.
        """
        if self.is_trained(name):
            require(~self.xpeft_bits[name].weight.any(), MaskFormatError(_not_taken_in(name)))
        if self._batch_rows is not None:
            return Mixing(self.masks(name, self._batch_rows), index=None, each=True)
        if self.specs[name].num_profiles == 1:
            return Mixing(self.masks(name, None), index=None, each=False)
        if name not in self._row_tensors:
            raise ConfigError(_no_profile(name, self.specs[name].num_profiles))
        return Mixing(self.masks(name, self._row_tensors[name]), index=None, each=False)

    def _active_rows(self, name: str) -> int | Tensor:
        if self._batch_rows is not None:
            return self._batch_rows
        row = self._rows.get(name, 0 if self.specs[name].num_profiles == 1 else None)
        if row is None:
            raise ConfigError(_no_profile(name, self.specs[name].num_profiles))
        return row

    def _take_in(self, name: str) -> None:
        """Bytes loaded into an adapter that trains (transformers' ``load_adapter`` does so) become its logits."""
        if not self.is_trained(name):
            return
        inbox = self.xpeft_bits[name].weight
        seen, version = self._inbox.get(name, (None, None))
        if seen is not inbox or version != _form(inbox)[0]:
            if inbox.any():
                gain_bits = self.xpeft_gain_bits[name].weight if self.specs[name].learn_gain else None
                self.specs[name].check(inbox, gain_bits)
                self.load(name, inbox, gain_bits)
                inbox.zero_()
            self._inbox[name] = (inbox, _form(inbox)[0])
        if self.training and torch.is_grad_enabled() and name in self.rebuilt:
            self.rebuilt.discard(name)
            warnings.warn(
                f"Adapter '{name}' was loaded from bits, which say which adapters are chosen but not how nearly others "
                "were: its training state is not in the file. Logits were rebuilt that choose the same adapters. To "
                "resume exactly, train with XPEFTCallback, which keeps the logits beside each checkpoint.",
                PeftXMaskWarning,
                stacklevel=2,
            )

    def _warn_of_frozen_masks(self, name: str) -> None:
        if self.is_trained(name) or name in self._warned or not (self.training and torch.is_grad_enabled()):
            return
        self._warned.add(name)
        warnings.warn(
            f"Adapter '{name}' was loaded for inference: it has masks and no logits, and training leaves them as they "
            "are. To train it, load it with is_trainable=True.",
            PeftXMaskWarning,
            stacklevel=2,
        )

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter."""
        super().delete_adapter(adapter_name)
        notes: list[dict[str, Any]] = [self.names, self.baked, self._rows, self._row_tensors, self._cache, self._inbox]
        for note in notes:
            note.pop(adapter_name, None)
        self._warned.discard(adapter_name)

    def __getstate__(self) -> dict[str, Any]:
        """Without what a copy computes anew."""
        return {**self.__dict__, "_cache": {}, "_in_graph": {}, "_noise": {}, "_inbox": {}, "_batch_rows": None}


def begin_forward(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the base model's root."""
    table: MaskTable = root.mask_table  # type: ignore[assignment]
    table.check_batch(*args, *kwargs.values())
    table.new_forward()


def end_forward(root: nn.Module, *_: Any) -> None:
    """Forward hook of the base model's root."""
    root.mask_table.end_forward()  # type: ignore[operator, union-attr]


def _distinct(rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Distinct rows, and for each example which of them; None where every example has one of its own, in order."""
    distinct, index = torch.unique(rows, return_inverse=True)
    return (rows, None) if len(distinct) == len(rows) else (distinct, index)


def _makes_graph(weights: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)


def _form(tensor: Tensor) -> tuple[int | None, torch.dtype, torch.device]:
    """Version (None in inference mode, where nothing is counted), dtype and device."""
    return None if tensor.is_inference() else tensor._version, tensor.dtype, tensor.device


def _no_profile(name: str, count: int) -> str:
    return (
        f"Adapter '{name}' holds {count} profiles and none was chosen. Call model.set_profile(row), or pass "
        "adapter_names, a LongTensor with one row for each example."
    )


def _not_taken_in(name: str) -> str:
    return (
        f"Adapter '{name}' is trained and a file was loaded into its bits. Run one forward pass that is not compiled, "
        "which makes them its logits."
    )
