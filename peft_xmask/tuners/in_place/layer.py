"""A base module whose parameters hold, in place of their own numbers, those of the active adapters.

```
serving:   module(x), with  own + delta_1 + delta_2 + ...  in its parameters
training:  the same forward pass; the backward pass hands each delta its gradient
disabled:  module(x), with its own numbers
```
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import BaseMismatchError, MergeError, StaleGraphError
from ..base.peft_private import BaseTunerLayer, check_adapters_to_merge
from ..sites.layer import module_widths
from .override import Override
from .sparse_gradients import Change, Places, run_changed
from .table import Line, Stamp


class InPlaceLayer(nn.Module, BaseTunerLayer):
    """Wraps one module. Subclasses say what each adapter adds to its parameters; several active adapters add up.

    The parameters are brought in line at the next forward pass, not when an adapter is set or trained: that is when it
    is known what is wanted. They get their own numbers back at once when adapters are disabled, unmerged or deleted,
    before the module is cast or moved, and before its state is read or loaded. So a state dict is the base's own,
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
        self._line, self._released = Line(), False
        self._unions: dict[str, tuple[tuple[Tensor, ...], Tensor, list[Tensor]]] = {}

    @property
    def dtype(self) -> torch.dtype:
        """Of the first of its parameters that are floating point: those of a quantised weight are not."""
        dtypes = [override.parameter.dtype for override in self._overrides.values()]
        return next((dtype for dtype in dtypes if dtype.is_floating_point), dtypes[0])

    @abstractmethod
    def has(self, adapter_name: str) -> bool:
        """Whether the adapter changes this module."""

    @abstractmethod
    def stamp(self, adapter_name: str) -> Stamp:
        """What tells whether the adapter's changes are still what they were: the same object as long as they are."""

    @abstractmethod
    def changes(self, adapter_name: str) -> Sequence[Change]:
        """What the adapter adds, parameter by parameter; with gradients where they are wanted and there are any."""

    def places(self, adapter_name: str) -> Mapping[str, Places]:
        """Where the adapter's changes are, by parameter; without the parameters that it changes as a whole."""
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
        if self._line.stale or not self._line.holds():
            self.bring_in_line()
        if torch.is_grad_enabled() and not self.merged_adapters:
            before_backward = partial(self._bring_back, self._line.served, self._edits())
            return self._run([name for name, _ in self._line.served], before_backward, x, *args, **kwargs)
        return self._modules["base_layer"](x, *args, **kwargs)  # type: ignore[misc]  # sooner found than as an attribute

    def _forward_in_graph(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """For ``torch.compile``: a graph cannot look at versions, so it writes each time it runs. That is cheap."""
        names = self._serving()
        self._write(names)
        self._line.stale = True
        if torch.is_grad_enabled() and not self.merged:
            return self._run(names, _nothing, x, *args, **kwargs)
        return self.base_layer(x, *args, **kwargs)

    def _run(self, names: list[str], before_backward: Callable[[], None], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The module's output, with gradients for what is trained of these adapters, which are in its parameters."""
        trained = [each for name in names for each in self.changes(name) if each.delta.requires_grad]
        if trained or x.requires_grad:
            return run_changed(self.base_layer, trained, before_backward, x, *args, **kwargs)
        return self.base_layer(x, *args, **kwargs)

    def _serving(self) -> list[str]:
        if self.merged:
            return self.merged_adapters
        return [] if self.disable_adapters else [name for name in self.active_adapters if self.has(name)]

    def bring_in_line(self) -> None:
        """Let the parameters be what the next forward pass needs, as it would itself."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        self._serve(self._serving())

    def _serve(self, names: list[str]) -> None:
        wanted = tuple((name, self.stamp(name)) for name in names)
        if self._line.stale or wanted != self._line.served:
            self._write(names)
            self.note_served(wanted)

    def serves(self, wanted: tuple[tuple[str, Stamp], ...]) -> bool:
        """Whether the parameters are in line for these adapters."""
        return not self._line.stale and self._line.served == wanted

    def note_served(self, served: tuple[tuple[str, Stamp], ...]) -> None:
        """Take it that the parameters are in line for these adapters."""
        self._line.served, self._line.stale = served, False

    def all_overrides(self) -> list[Override]:
        """Of all of the module's own parameters."""
        return list(self._overrides.values())

    def _bring_back(self, served: tuple[tuple[str, Stamp], ...], edits: list[tuple[int, int]]) -> None:
        """Let the parameters be what they were in a forward pass that served these adapters."""
        names = [name for name, _ in served]
        if (
            self._released
            or self._edits() != edits
            or any(not self.has(name) or self.stamp(name) is not stamp for name, stamp in served)
        ):
            raise StaleGraphError(
                "Expected a base and adapters as they were in the forward pass, found that they were changed, deleted "
                "or unloaded since. Run backward before the optimizer's step and before such calls."
            )
        changes = self._line.stale or self._line.served != served
        self._serve(names)
        self._line.stale = changes

    def _edits(self) -> list[tuple[int, int]]:
        return [override.edits for override in self._overrides.values()]

    def _write(self, names: Sequence[str]) -> None:
        if not names:
            self.restore()
            return
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
        """All changes of one parameter as one: where, and how much. Changes of the whole parameter come alone."""
        places = [None if change.places is None else change.places.on(device) for change in changes]
        deltas = [change.delta.to(device) for change in changes]
        if all(each is places[0] for each in places):
            return places[0], sum(deltas[1:], deltas[0])
        union, positions = self._union(changes[0].name, [each for each in places if each is not None])
        total = torch.zeros(union.numel(), device=device, dtype=deltas[0].dtype)
        for position, delta in zip(positions, deltas, strict=True):
            total.index_add_(0, position, delta.to(total.dtype))
        return union, total

    def _union(self, name: str, indexes: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Of places in a parameter: all, and where each index's are among them; found once."""
        if name not in self._unions or not _same(self._unions[name][0], indexes):
            union = torch.unique(torch.cat(list(indexes)))
            self._unions[name] = (tuple(indexes), union, [torch.searchsorted(union, index) for index in indexes])
        return self._unions[name][1:]

    def _find_unions(self) -> None:
        """Find the unions of the next forward pass: a graph could not, since their sizes depend on numbers."""
        serving = self._serving()
        if len(serving) < 2:
            return
        places: dict[str, list[Tensor]] = {}
        for adapter_name in serving:
            for name, each in self.places(adapter_name).items():
                places.setdefault(name, []).append(each.on(self._overrides[name].parameter.device))
        for name, indexes in places.items():
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
            self._serve([name] if name != "__base__" and self.has(name) else [])
            y = self.base_layer(x[rows], *args, **kwargs)
            if out is None:
                out = y.new_empty((x.shape[0], *y.shape[1:]))
            out[rows] = y
        self._line.stale = True
        return out

    def restore(self) -> None:
        """Give the module's parameters their own numbers back.

        Raises:
            BaseMismatchError: somebody changed them while an adapter was in them.
        """
        for override in self._overrides.values():
            override.restore()
        self._line.served, self._line.stale = (), True

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters. If none of them changes this module, it gets its own numbers back at once."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._note_set_adapter()

    def _note_set_adapter(self) -> None:
        self._line.stale = True  # torch does not count changes through .data
        serving = self._serving()
        if self._line.served and not serving:
            self.restore()
        if len(serving) > 1:
            self._find_unions()

    def train(self, mode: bool = True) -> Any:
        """Set the mode; the parameters are brought in line anew."""
        self._line.stale = True
        return super().train(mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable all adapters. Disabled, the module has its own numbers at once, unless they are merged."""
        super().enable_adapters(enabled)
        self._line.stale = True
        if not enabled and not self.merged:
            self.restore()

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter."""
        if adapter_name in self.merged_adapters:
            self.unmerge()
        if any(name == adapter_name for name, _ in self._line.served):
            self.restore()
        self._unions.clear()
        super().delete_adapter(adapter_name)
        self._find_unions()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters into the module's parameters until :meth:`unmerge`, whatever is set, enabled or read meanwhile.

        The numbers are the very ones that unmerged adapters put there.

        Args:
            safe_merge: refuse, before anything is changed, a result that is not finite.

        Raises:
            MergeError: with ``safe_merge``, a result that is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self.has(name)]
        if not self.merged:
            self.restore()  # of what is served, but is not to be merged
        merged = list(self.merged_adapters)
        for name in names:
            self._write([*merged, name])
            written = [each.parameter for each in self._overrides.values() if each.written]
            if safe_merge and not all(parameter.isfinite().all() for parameter in written):
                self._write(self.merged_adapters)
                self._line.served, self._line.stale = (), True
                raise MergeError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken. This module was left "
                    "as it was; load or train the adapter again."
                )
            merged.append(name)
        self.merged_adapters = merged
        self._line.served, self._line.stale = tuple((name, self.stamp(name)) for name in merged), False

    def unmerge(self) -> None:
        """Give the parameters their own numbers back, bit for bit."""
        self.merged_adapters.clear()
        self.restore()
        self._find_unions()

    def release(self, *, restore: bool) -> None:
        """The layer is about to leave its model: give the parameters their own numbers back, unless they are merged."""
        if restore:
            self.unmerge()
        self._released = True

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The base's own numbers (and whatever the adapters hold); merged adapters stay merged."""
        if not self.merged:
            self.restore()
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """What is loaded is the base's own, whatever was there."""
        for name, override in self._overrides.items():
            if f"{prefix}base_layer.{name}" in state_dict:
                try:
                    override.restore()
                except BaseMismatchError:
                    override.forget()
                self._line.served, self._line.stale = (), True
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Cast or move the base's own numbers; merged adapters are merged again."""
        self.restore()
        applied = super()._apply(fn, recurse)
        if self.merged:
            self._write(self.merged_adapters)
        for adapter_name in self._all_available_adapter_names():
            for name, each in self.places(adapter_name).items():
                each.on(self._overrides[name].parameter.device)
        self._find_unions()
        return applied


def _same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))


def _nothing() -> None:
    """Before the backward pass of a graph: its tensors are its own."""
