"""A base module whose parameters hold the values of the active adapters instead of the original ones.

```
serving:   module(x), with  original + delta_1 + delta_2 + ...  in its parameters
training:  the same forward pass; the backward pass gives each delta its gradient
disabled:  module(x), with its original parameters
```
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import BaseMismatchError, ConfigError, MergeError, StaleGraphError
from ..base.layer import TargetLayer
from ..base.peft_private import check_adapters_to_merge
from ..sites.places import module_widths
from .autograd import Change, TrainedChange, run_changed
from .flat_indices import FlatIndices
from .guard import LayerUse, PassGuard
from .override import Override
from .table import DeltaTable
from .version import ParameterState, Served, TensorVersion


class InPlaceLayer(TargetLayer):
    """Wraps one module. A subclass defines what each adapter adds to its parameters; active adapters are summed.

    :meth:`sync` is the only method that writes into the parameters. It runs at the start of a forward pass, not when an
    adapter is set or trained, because only the forward pass knows which adapters are needed. Before the module is
    disabled, unmerged, cast, moved, saved or loaded, :meth:`sync` restores the original values. A state dict therefore
    holds the base's original parameters, unless adapters are merged.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features: int | None
        self.out_features: int | None
        self.in_features, self.out_features = module_widths(self.get_base_layer()) or (None, None)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        base = self.get_base_layer()
        self._overrides = {name: Override(base, name) for name, _ in base.named_parameters(recurse=False)}
        self._state, self._use, self._released = ParameterState(), LayerUse(PassGuard()), False
        self._unions: dict[str, tuple[tuple[Tensor, ...], Tensor, list[Tensor]]] = {}
        self._table: tuple[DeltaTable, ...] = ()

    @property
    def table(self) -> DeltaTable:
        """The model's table of adapters."""
        return self._table[0]

    def join(self, table: DeltaTable) -> None:
        """Attach the layer to a model's table. A tuple holds it, so that torch does not register it as a submodule."""
        self._table = (table,)
        self._use.guard = table.guard
        table.probe = table.probe or next(iter(self._overrides.values()), None)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating point parameter; a quantised weight is not one."""
        dtypes = [override.parameter.dtype for override in self._overrides.values()]
        return next((dtype for dtype in dtypes if dtype.is_floating_point), dtypes[0])

    @abstractmethod
    def has(self, adapter_name: str) -> bool:
        """Whether the adapter changes this module."""

    @abstractmethod
    def version(self, adapter_name: str) -> TensorVersion:
        """The version of the adapter's values: the same object until the values change."""

    @abstractmethod
    def changes(self, adapter_name: str) -> Sequence[Change]:
        """What the adapter adds to each parameter, with a gradient where one is needed."""

    @abstractmethod
    def adapted_parameters(self, adapter_name: str) -> list[str]:
        """Names of the parameters that the adapter changes here."""

    def trained_changes(self, adapter_name: str) -> Sequence[TrainedChange]:
        """What the adapter trains in this module."""
        return [change for change in self.changes(adapter_name) if change.delta.requires_grad]

    def indices(self, adapter_name: str) -> Mapping[str, FlatIndices]:
        """The elements that the adapter changes, by parameter. Parameters that it changes completely are left out."""
        return {}

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The module's output with the active adapters in its parameters.

        Args:
            x: the module's input.
            adapter_names: one adapter name, or ``"__base__"``, for each example of the batch.

        Raises:
            BaseMismatchError: the base's parameters were modified while an adapter was written into them.
        """
        if adapter_names is not None and not self._disable_adapters:
            return self._forward_mixed(x, adapter_names, *args, **kwargs)
        if torch.compiler.is_compiling():
            return self._forward_in_graph(x, *args, **kwargs)
        self._enter()
        try:
            if torch.is_grad_enabled() and not self.merged_adapters:
                served = self._state.served
                as_now = partial(self._as_in_forward, served, self._edits())
                return self._run([name for name, _ in served], as_now, x, *args, **kwargs)
            return self._modules["base_layer"](x, *args, **kwargs)  # type: ignore[misc]  # faster than as an attribute
        finally:
            self._use.leave()

    def _enter(self, names: Sequence[str] | None = None) -> None:
        """Sync, and register this thread. Until it leaves, no other thread writes into the parameters."""
        use = self._use
        with use.guard.condition:
            if names is not None or not self._state.is_current():
                self.sync(names)
            use.enter()

    def _forward_in_graph(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """For ``torch.compile``: a graph cannot compare versions, so it writes on every run, which is cheap."""
        self.sync()
        if torch.is_grad_enabled() and not self.merged:
            return self._run(self._wanted(), nullcontext, x, *args, **kwargs)
        return self.base_layer(x, *args, **kwargs)

    def _run(
        self,
        names: Sequence[str],
        as_in_forward: Callable[[], AbstractContextManager[None]],
        x: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The module's output, with gradients for the trainable values of the adapters that its parameters hold."""
        trained = [change for name in names for change in self.trained_changes(name)]
        if trained or x.requires_grad:
            return run_changed(self.base_layer, trained, as_in_forward, x, *args, **kwargs)
        return self.base_layer(x, *args, **kwargs)

    def _wanted(self) -> list[str]:
        """The adapters that the next forward pass needs."""
        if self.merged:
            return self.merged_adapters
        return [] if self.disable_adapters else [name for name in self.active_adapters if self.has(name)]

    def sync(self, names: Sequence[str] | None = None) -> None:
        """Write exactly these adapters into the parameters. Waits for the forward passes of other threads.

        Args:
            names: None: the adapters that the next forward pass needs. With names, that pass calls ``sync`` again.

        Raises:
            BaseMismatchError: the parameters were modified while an adapter was in them. They are not overwritten.
            FileFormatError: in eval mode, an adapter has values that are not finite.
        """
        if torch.compiler.is_compiling():
            self._write(self._wanted() if names is None else names)
            self._state.stale = True
            return
        with self._use.guard.condition:
            self._use.wait()
            if names is None:
                if self.disable_adapters and self.merged:
                    self.unmerge()
                if self._sync_all_layers():
                    return
            wanted = tuple((name, self.version(name)) for name in (self._wanted() if names is None else names))
            if self._state.stale or wanted != self._state.served:
                self._state.stale = True
                self._write([name for name, _ in wanted])
                self.note_served(wanted, stale=names is not None)

    def _sync_all_layers(self) -> bool:
        """Hook for a subclass that syncs all layers of the model at once. Returns whether it did."""
        return False

    def note_served(self, served: Served, *, stale: bool = False) -> None:
        """Record what the parameters hold now, and whether the next forward pass has to check it again."""
        self._state.served, self._state.stale = served, stale

    def serves(self, wanted: Served) -> bool:
        """Whether the parameters hold these adapters at these versions, ready for the next forward pass."""
        return not self._state.stale and self._state.served == wanted

    @property
    def in_use_by_others(self) -> bool:
        """Whether another thread is inside this layer's forward pass."""
        return self._use.by_others

    def all_overrides(self) -> list[Override]:
        """The overrides of all parameters of the module."""
        return list(self._overrides.values())

    @contextmanager
    def _as_in_forward(self, served: Served, edits: list[tuple[int, int]]) -> Iterator[None]:
        """For a backward pass: make the parameters hold what they held in its forward pass."""
        with self._use.guard.condition:
            if (
                self._released
                or self._edits() != edits
                or any(not self.has(name) or self.version(name) is not version for name, version in served)
            ):
                raise StaleGraphError(
                    "Expected the base and the adapters of the forward pass, but they have been changed, deleted or "
                    "unloaded since. Run backward before the optimizer's step and before such calls."
                )
            self._enter([name for name, _ in served])
        try:
            yield
        finally:
            self._use.leave()

    def _edits(self) -> list[tuple[int, int]]:
        return [override.edits for override in self._overrides.values()]

    def _write(self, names: Sequence[str]) -> None:
        """The writing part of :meth:`sync`."""
        with torch.no_grad():
            by_parameter: dict[str, list[Change]] = {}
            for name in names:
                for change in self.changes(name):
                    by_parameter.setdefault(change.name, []).append(change)
            for name, override in self._overrides.items():
                if name not in by_parameter:
                    override.restore()
            for name, changes in by_parameter.items():
                override = self._overrides[name]
                override.write(*self._sum(changes, override.parameter.device))

    def _sum(self, changes: Sequence[Change], device: torch.device) -> tuple[Tensor | None, Tensor]:
        """The sum of one parameter's changes: indices and values. A change of the whole parameter is the only one."""
        indexes = [None if change.indices is None else change.indices.on(device) for change in changes]
        deltas = [change.delta.to(device) for change in changes]
        if all(each is indexes[0] for each in indexes):
            return indexes[0], sum(deltas[1:], deltas[0])
        union, positions = self._union(changes[0].name, [each for each in indexes if each is not None])
        total = torch.zeros(union.numel(), device=device, dtype=deltas[0].dtype)
        for position, delta in zip(positions, deltas, strict=True):
            total.index_add_(0, position, delta.to(total.dtype))
        return union, total

    def _union(self, name: str, indexes: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The union of several indices into a parameter, and the positions of each index in it. Cached."""
        if name not in self._unions or not _same(self._unions[name][0], indexes):
            union = torch.unique(torch.cat(list(indexes)))
            self._unions[name] = (tuple(indexes), union, [torch.searchsorted(union, index) for index in indexes])
        return self._unions[name][1:]

    def _find_unions(self) -> None:
        """Compute the unions for the next forward pass. A compiled graph cannot: their sizes depend on data."""
        wanted = self._wanted()
        if len(wanted) < 2:
            return
        found: dict[str, list[Tensor]] = {}
        for adapter_name in wanted:
            for name, each in self.indices(adapter_name).items():
                found.setdefault(name, []).append(each.on(self._overrides[name].parameter.device))
        for name, indexes in found.items():
            if any(index is not indexes[0] for index in indexes):
                self._union(name, indexes)

    def _forward_mixed(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Any:
        """Run one pass per adapter, over that adapter's examples."""
        if len(adapter_names) != x.shape[0]:
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {len(adapter_names)} "
                f"and {x.shape[0]} respectively."
            )
        out: Tensor | None = None
        for name in dict.fromkeys(adapter_names):
            rows = [i for i, other in enumerate(adapter_names) if other == name]
            self._enter([name] if name != "__base__" and self.has(name) else [])
            try:
                y = self.base_layer(x[rows], *(_picked(each, rows, x) for each in args), **kwargs)
            finally:
                self._use.leave()
            if not isinstance(y, Tensor):
                raise ConfigError(
                    f"Cannot pass `adapter_names` through a {type(self.base_layer).__name__}, which returns a "
                    f"{type(y).__name__}: expected one tensor. Set one adapter for the whole batch instead."
                )
            if out is None:
                out = y.new_empty((x.shape[0], *y.shape[1:]))
            out[rows] = y
        return out

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters. If none of them changes this module, its original values are restored at once."""
        self._use.guard.note_switch()
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._note_set_adapter()

    def _note_set_adapter(self) -> None:
        self._state.stale = True  # torch does not count changes through .data
        wanted = self._wanted()
        if self._state.served and not wanted:
            self.sync(())
        if len(wanted) > 1:
            self._find_unions()

    def train(self, mode: bool = True) -> Any:
        """Set training or evaluation mode. The next forward pass syncs."""
        self._state.stale = True
        return super().train(mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable all adapters. Disabling restores the original values at once, unless merged."""
        self._use.guard.note_toggle()
        super().enable_adapters(enabled)
        self._state.stale = True
        if not enabled and not self.merged:
            self.sync(())

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter."""
        self._use.guard.note_toggle()
        if adapter_name in self.merged_adapters:
            self.unmerge()
        if any(name == adapter_name for name, _ in self._state.served):
            self.sync(())
        self._unions.clear()
        super().delete_adapter(adapter_name)
        self._find_unions()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Keep adapters in the module's parameters until :meth:`unmerge`, whichever adapters are set meanwhile.

        The parameters get exactly the values that they have while the same adapters are active and unmerged.

        Args:
            safe_merge: check that the result is finite.

        Raises:
            MergeError: with ``safe_merge``, the result is not finite. The module is not modified.
        """
        self._use.guard.note_toggle()
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self.has(name)]
        merged = list(self.merged_adapters)
        for name in names:
            if safe_merge and not self._is_finite([*merged, name]):
                self.sync(self.merged_adapters)
                raise MergeError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken. This module was left "
                    "as it was; load or train the adapter again."
                )
            merged.append(name)
        self.sync(merged)
        self.merged_adapters = merged

    def _is_finite(self, names: Sequence[str]) -> bool:
        """Whether all parameters are finite with these adapters written into them."""
        if not all(change.delta.isfinite().all() for name in names for change in self.changes(name)):
            return False
        self.sync(names)
        return all(bool(each.parameter.isfinite().all()) for each in self._overrides.values() if each.written)

    def unmerge(self) -> None:
        """Restore the original values, bit for bit."""
        self._use.guard.note_toggle()
        self.merged_adapters.clear()
        self.sync(())
        self._find_unions()

    def release(self, *, restore: bool) -> None:
        """Prepare for removal from the model. Restores the original values if asked to."""
        if restore:
            self.unmerge()
        self._released = True

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The base's original parameters and the adapters' tensors. Merged adapters stay merged."""
        if not self.merged:
            self.sync(())
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Loaded values replace the original ones."""
        loaded = [each for name, each in self._overrides.items() if f"{prefix}base_layer.{name}" in state_dict]
        if loaded:
            try:
                self.sync(())
            except BaseMismatchError:
                for override in loaded:
                    override.forget()
                self.sync(())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Cast or move the original parameters, then merge merged adapters again."""
        self.sync(())
        applied = super()._apply(fn, recurse)
        if self.merged:
            self.sync(self.merged_adapters)
        for adapter_name in self._all_available_adapter_names():
            for name, each in self.indices(adapter_name).items():
                each.on(self._overrides[name].parameter.device)
        self._find_unions()
        return applied


def _picked(argument: Any, rows: list[int], x: Tensor) -> Any:
    """The rows of an argument if it has as many as the input; otherwise the whole argument."""
    return argument[rows] if isinstance(argument, Tensor) and argument.shape[:1] == x.shape[:1] else argument


def _same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))
