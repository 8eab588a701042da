"""Whether a model calls the modules that are adapted.

An adapter acts when its module is called. Some modules are not: their parent reads their weight and computes with it
itself. What is known of such parents is asked before a model is changed; the rest shows in the first forward pass.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import warnings
from functools import partial
from typing import Any

import torch
from torch import nn

from ...errors import PeftXMaskWarning, TargetError

_DIGITS = re.compile(r"\d+")
_READ = re.compile(r"\bself\.(\w+)\.weight\b")


def why_not_called(parent: nn.Module, child: str) -> str | None:
    """Why a module does not call one of its children, or None if it does, as far as is known.

    Args:
        child: name of the child in its parent.
    """
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads the weights of its modules and computes with them itself"
    if child in _read_directly(type(parent)):
        return f"{type(parent).__name__} reads its weight and computes with it itself, in fused kernels"
    return None


def refuse_uncalled(model: nn.Module, names: list[str]) -> None:
    """Reject targets that their parents do not call.

    Raises:
        TargetError: names the first one, and why it is not called.
    """
    for name in names:
        parent, _, child = name.rpartition(".")
        if reason := why_not_called(model.get_submodule(parent), child):
            raise TargetError(
                f"Module '{name}' is never called: {reason}. An adapter there would have no effect. Take it out of "
                "target_modules, or add it to exclude_modules."
            )


def worth_adapting(model: nn.Module, names: set[str]) -> set[str]:
    """Of some linear modules those that their parents call, as far as is known, and that are not a router of experts.

    A router (Llama 4's is a subclass of ``nn.Linear``) returns more than one tensor.
    """
    found = set()
    for name in names:
        parent, _, child = name.rpartition(".")
        router = type(model.get_submodule(name)).__name__.endswith("Router")
        if not router and why_not_called(model.get_submodule(parent), child) is None:
            found.add(name)
    return found


def _read_directly(parent: type[nn.Module]) -> frozenset[str]:
    """The children whose weights a class of transformers uses without calling them, always or in fused kernels.

    Transformers names some in a decorator (``force_accelerate_hooks``), so that hooks of theirs are run nevertheless.
    The forward pass that is decorated shows the others.
    """
    function: Any = parent.forward
    named: set[str] = set()
    while True:
        if inspect.isfunction(function):
            named.update(inspect.getclosurevars(function).nonlocals.get("child_module_names") or ())
        inner = getattr(function, "__wrapped__", None)
        if inner is None:
            break
        function = inner
    if named:
        with contextlib.suppress(OSError, TypeError):  # there is no source
            named.update(_READ.findall(inspect.getsource(function)))
    return frozenset(named)


class FirstPassWatch:
    """Looks at the first forward pass of a base model, to see which adapted modules it calls.

    Modules whose names differ in numbers alone count as one kind: an expert that no token is routed to, or a block that
    is skipped at random, is not missed as long as another of its kind is called.

    Args:
        model: the base model.
        layers: the layers that replaced the adapted modules, by name.
    """

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module]) -> None:
        self._layers, self._missing = dict(layers), set(layers)
        self._in_a_graph = self._done = False
        self._handles = [model.register_forward_hook(self._end)]
        for name, layer in layers.items():
            self._handles.append(layer.register_forward_pre_hook(partial(self._called, name)))

    def _called(self, name: str, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self._missing.discard(name)

    def _end(self, model: nn.Module, *_: Any) -> None:
        """Report once. Adapters that were unloaded before the first pass are not missed.

        Raises:
            TargetError: no adapted module was called.
        """
        if torch.compiler.is_compiling():
            self._in_a_graph = True
            return
        if self._done:
            return
        self._done = True
        if not self._in_a_graph:  # a graph is guarded by the hooks that it was made with
            for handle in self._handles:
                handle.remove()
        modules = dict(model.named_modules(remove_duplicate=False))
        present = {name for name, layer in self._layers.items() if modules.get(name) is layer}
        self._missing &= present
        called = {_kind(name) for name in present - self._missing}
        self._layers = {}
        missing = sorted(name for name in self._missing if _kind(name) not in called)
        if not missing:
            return
        words = (
            f"{', '.join(map(repr, missing[:3]))}{' and others' if len(missing) > 3 else ''}: "
            f"{len(missing)} adapted module{'s were' if len(missing) > 1 else ' was'} not called in the first forward "
            "pass"
        )
        if not called:
            raise TargetError(
                f"{words}, and no other adapted module was. The adapter had no effect on this pass. If the model never "
                "calls these modules, choose other target_modules. This check is made once: if this batch is an "
                "exception, go on with the next."
            )
        warnings.warn(
            f"{words}, so their adapters had no effect on it. If your batches never reach these modules (another "
            "tower, another modality), or the model reads their weights without calling them, add them to "
            "exclude_modules.",
            PeftXMaskWarning,
            stacklevel=2,
        )


def _kind(name: str) -> str:
    return _DIGITS.sub("#", name)
