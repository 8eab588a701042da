"""The layer that replaces an adapted module, and is called whenever the module would be."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from .peft_private import BaseTunerLayer

_OWN_SETTING = "own_use_nested_tensor"
"""Attribute of an ``nn.TransformerEncoder``: its own ``use_nested_tensor``, while adapters are at work in it."""


class SlowPath:
    """Makes an ``nn.TransformerEncoderLayer`` call an adapted module.

    In eval mode such a layer hands the weights of its modules to one fused kernel, unless one of them has a hook, and
    the encoder around it turns padded batches into nested tensors. While adapters are enabled, the adapted module has
    a hook that does nothing, and the encoder keeps padded batches as they are. While they are disabled it has no hook
    of ours at all, so that the base's output is that of its own kernel.

    Args:
        layer: the layer that replaced the adapted module.
        encoder: around it; None: there is none.
    """

    def __init__(self, layer: nn.Module, encoder: nn.TransformerEncoder | None) -> None:
        self._layer, self._encoder = (layer,), (encoder,)
        self._hooks: list[Any] = [_nothing]
        self._handles: list[RemovableHandle] = []

    def add_hook(self, hook: Any) -> None:
        """Let the module have a forward pre-hook, with keyword arguments, while adapters are enabled."""
        self._hooks.append(hook)
        if self._handles:
            self._handles.append(self._layer[0].register_forward_pre_hook(hook, with_kwargs=True))

    def has_hook(self, kind: type) -> bool:
        """Whether a hook of this class was added."""
        return any(isinstance(each, kind) for each in self._hooks)

    def take(self, wanted: bool) -> None:
        """Take the slow path from now on, or leave the choice to PyTorch."""
        (layer,), (encoder,) = self._layer, self._encoder
        if wanted and not self._handles:
            self._handles = [layer.register_forward_pre_hook(each, with_kwargs=True) for each in self._hooks]
        elif not wanted:
            while self._handles:
                self._handles.pop().remove()
        if encoder is None:
            return
        if wanted and not hasattr(encoder, _OWN_SETTING):
            setattr(encoder, _OWN_SETTING, getattr(encoder, "use_nested_tensor", False))
            encoder.use_nested_tensor = False
        elif not wanted and hasattr(encoder, _OWN_SETTING):
            encoder.use_nested_tensor = getattr(encoder, _OWN_SETTING)
            delattr(encoder, _OWN_SETTING)


class TargetLayer(nn.Module, BaseTunerLayer):
    """Base class of layers that replace an adapted module."""

    slow_path: SlowPath | None = None
    cast_input_dtype_enabled = True
    """What ``peft.helpers.disable_input_dtype_casting`` switches off."""

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable all adapters."""
        super().enable_adapters(enabled)
        if self.slow_path is not None:
            self.slow_path.take(enabled)


def find_slow_path(model: nn.Module, name: str, layer: nn.Module) -> SlowPath | None:
    """What an adapted module needs in order to be called; None for modules whose parents always call them.

    Args:
        name: of the module in its model.
        layer: what is put in its place.
    """
    parents = [model, *(model.get_submodule(name[:i]) for i, letter in enumerate(name) if letter == ".")]
    if not isinstance(parents[-1], nn.TransformerEncoderLayer):
        return None
    encoders = [each for each in parents if isinstance(each, nn.TransformerEncoder)]
    return SlowPath(layer, encoders[-1] if encoders else None)


def _nothing(*_: Any) -> None:
    """Do nothing: that there is a hook is enough."""
