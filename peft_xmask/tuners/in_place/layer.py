"""A base module whose parameters hold, in place of their own numbers, those of the active adapters.

```
serving:   module(x), with  own + delta_1 + delta_2 + ...  in its parameters
training:  the same forward pass; the backward pass hands each delta its gradient
disabled:  module(x), with its own numbers
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
from ..sites.layer import module_widths
from .autograd import Change, TrainedChange, run_changed
from .flat_indices import FlatIndices
from .guard import LayerUse, PassGuard
from .override import Override
from .table import DeltaTable
from .version import ParameterState, Served, TensorVersion


class InPlaceLayer(TargetLayer):
    """Wraps one module. Subclasses say what each adapter adds to its parameters; several active adapters add up.

    :meth:`sync` is the only method that writes into the parameters. A forward pass calls it, and not the setting or
    training of an adapter, because only then is it known what is wanted. Before the module is disabled, unmerged, cast,
    moved, saved or loaded, :meth:`sync` gives the parameters their own numbers back. So a state dict is the base's own,
    unless adapters are merged.
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
        """The table of the model that the layer is part of."""
        return self._table[0]

    def join(self, table: DeltaTable) -> None:
        """Become part of a model. The table is held in a tuple: it belongs to the root, not to this module."""
        self._table = (table,)
        self._use.guard = table.guard

    @property
    def dtype(self) -> torch.dtype:
        """Of the first parameter that is floating point: a quantised weight is not."""
        dtypes = [override.parameter.dtype for override in self._overrides.values()]
        return next((dtype for dtype in dtypes if dtype.is_floating_point), dtypes[0])

    @abstractmethod
    def has(self, adapter_name: str) -> bool:
        """Whether the adapter changes this module."""

    @abstractmethod
    def version(self, adapter_name: str) -> TensorVersion:
        """The version of what the adapter's changes are made from: the same object as long as they stay the same."""

    @abstractmethod
    def changes(self, adapter_name: str) -> Sequence[Change]:
        """What the adapter adds, parameter by parameter; with gradients where they are wanted and there are any."""

    def trained_changes(self, adapter_name: str) -> Sequence[TrainedChange]:
        """What the adapter trains in this module."""
        return [change for change in self.changes(adapter_name) if change.delta.requires_grad]

    def indices(self, adapter_name: str) -> Mapping[str, FlatIndices]:
        """Which elements the adapter changes, by parameter; without the parameters that it changes as a whole."""
        return {}

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The module's output with the active adapters in its parameters.

        Args:
            x: the module's input.
            adapter_names: one adapter name, or ``"__base__"``, for each example of the batch.

        Raises:
            BaseMismatchError: somebody changed the base's parameters while an adapter was in them.
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
        """Sync and let this thread in. Until it leaves, no other thread writes into the parameters."""
        use = self._use
        with use.guard.condition:
            if names is not None or not self._state.is_current():
                self.sync(names)
            use.enter()

    def _forward_in_graph(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """For ``torch.compile``: a graph cannot look at versions, so it writes each time it runs. That is cheap."""
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
        """The module's output, with gradients for what is trained of these adapters, which are in its parameters."""
        trained = [change for name in names for change in self.trained_changes(name)]
        if trained or x.requires_grad:
            return run_changed(self.base_layer, trained, as_in_forward, x, *args, **kwargs)
        return self.base_layer(x, *args, **kwargs)

    def _wanted(self) -> list[str]:
        """The adapters that the next forward pass is to serve."""
        if self.merged:
            return self.merged_adapters
        return [] if self.disable_adapters else [name for name in self.active_adapters if self.has(name)]

    def sync(self, names: Sequence[str] | None = None) -> None:
        """Make the parameters hold the changes of these adapters and of no others. Waits for passes of other threads.

        Args:
            names: None: the adapters that the next forward pass is to serve. Otherwise that pass calls ``sync`` again.

        Raises:
            BaseMismatchError: somebody changed the parameters while an adapter was in them; nothing is written over it.
            FileFormatError: in eval mode, an adapter has numbers that are not finite.
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
        """Let a subclass sync all layers of the model at once. Returns whether it did."""
        return False

    def note_served(self, served: Served, *, stale: bool = False) -> None:
        """Record what the parameters hold now, and whether the next forward pass may want something else."""
        self._state.served, self._state.stale = served, stale

    def serves(self, wanted: Served) -> bool:
        """Whether the parameters hold these adapters at these versions, and the next forward pass can use them."""
        return not self._state.stale and self._state.served == wanted

    @property
    def in_use_by_others(self) -> bool:
        """Whether another thread is inside this layer's forward pass."""
        return self._use.by_others

    def all_overrides(self) -> list[Override]:
        """Of all of the module's own parameters."""
        return list(self._overrides.values())

    @contextmanager
    def _as_in_forward(self, served: Served, edits: list[tuple[int, int]]) -> Iterator[None]:
        """For a backward pass: the parameters hold what they held in the forward pass that served these adapters."""
        with self._use.guard.condition:
            if (
                self._released
                or self._edits() != edits
                or any(not self.has(name) or self.version(name) is not version for name, version in served)
            ):
                raise StaleGraphError(
                    "Expected a base and adapters as they were in the forward pass, but they have been changed, "
                    "deleted or unloaded since. Run backward before the optimizer's step and before such calls."
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
        """All changes of one parameter as one: where, and how much. A change of the whole parameter comes alone."""
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
        """The union of indexes into a parameter, and the positions of each index in it; computed once."""
        if name not in self._unions or not _same(self._unions[name][0], indexes):
            union = torch.unique(torch.cat(list(indexes)))
            self._unions[name] = (tuple(indexes), union, [torch.searchsorted(union, index) for index in indexes])
        return self._unions[name][1:]

    def _find_unions(self) -> None:
        """Compute the unions of the next forward pass: a graph cannot, since their sizes depend on data."""
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
        """One pass for each adapter over its own examples."""
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
        """Set the active adapters. If none of them changes this module, it gets its own numbers back at once."""
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
        """Set the mode. The next forward pass syncs."""
        self._state.stale = True
        return super().train(mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable all adapters. Disabled, the module has its own numbers at once, unless they are merged."""
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
        """Put adapters into the module's parameters until :meth:`unmerge`, whatever is set, enabled or read meanwhile.

        The numbers are the very ones that unmerged adapters put there.

        Args:
            safe_merge: refuse a result that is not finite.

        Raises:
            MergeError: with ``safe_merge``, a result that is not finite; the module is left as it was.
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
        """Whether these adapters, put into the parameters, leave only finite numbers there."""
        if not all(change.delta.isfinite().all() for name in names for change in self.changes(name)):
            return False
        self.sync(names)
        return all(bool(each.parameter.isfinite().all()) for each in self._overrides.values() if each.written)

    def unmerge(self) -> None:
        """Give the parameters their own numbers back, bit for bit."""
        self._use.guard.note_toggle()
        self.merged_adapters.clear()
        self.sync(())
        self._find_unions()

    def release(self, *, restore: bool) -> None:
        """The layer is about to leave its model: give the parameters their own numbers back, unless they are merged."""
        if restore:
            self.unmerge()
        self._released = True

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The base's own numbers (and whatever the adapters hold); merged adapters stay merged."""
        if not self.merged:
            self.sync(())
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """What is loaded becomes the base's own, whatever was there."""
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
        """Cast or move the base's own numbers; merged adapters are merged again."""
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
    """The part of an argument that belongs to some rows of the input; all of it if it has other rows than the input."""
    return argument[rows] if isinstance(argument, Tensor) and argument.shape[:1] == x.shape[:1] else argument


def _same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))
