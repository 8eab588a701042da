"""Offsets of profiles: a few numbers each, added to what a classification head gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError, MaskFormatError
from ..base.state import PackedTensor
from .table import MaskTable

HEADS = ("classifier", "score")
"""Names that transformers gives to the head of a sequence classifier."""


class OffsetHook:
    """Forward hook of a head: adds the offset of each example's profile to its outputs.

    Args:
        table: of the model.
    """

    def __init__(self, table: MaskTable) -> None:
        self.table = table

    def __call__(self, head: nn.Module, inputs: Any, output: Any) -> Any:
        """The outputs, ``[B, C]`` or ``[B, T, C]``, with offsets ``[B, C]`` added.

        Raises:
            ConfigError: an adapter of several profiles, and none was chosen; or offsets for another number of outputs.
            MaskFormatError: offsets that are not finite.
        """
        if self.table.disable_adapters or not isinstance(output, Tensor):
            return output
        for name in self.table.active_adapters:
            found = self.table.offsets(name)
            if found is not None:
                output = output + _fitted(found, output)
        return output


def set_offsets(model: nn.Module, table: MaskTable, adapter_name: str, offset_bits: Tensor | None) -> None:
    """Give an adapter's profiles offsets, or none.

    Args:
        model: with the head, wrapped by PEFT or not.
        table: of the model.
        adapter_name: of the profiles.
        offset_bits: uint8 ``[P, 2 * C]``, half-precision numbers; None: no offsets.

    Raises:
        ConfigError: the model has no classification head.
        MaskFormatError: bytes of another shape or dtype.
    """
    masks = table.adapters[adapter_name]
    if offset_bits is not None:
        count = masks.spec.num_profiles
        width = offset_bits.shape[-1] if offset_bits.dim() == 2 else 0
        if offset_bits.dtype != torch.uint8 or len(offset_bits) != count or not width or width % 2:
            raise MaskFormatError(
                f"Expected offsets as uint8 of shape ({count}, 2 * outputs), found {offset_bits.dtype} of shape "
                f"{tuple(offset_bits.shape)}. The file is damaged."
            )
        if table.offset_hook is None:
            table.offset_hook = _head_of(model).register_forward_hook(OffsetHook(table))
            table.hooks.append(table.offset_hook)
        offset_bits = offset_bits.to(masks.bits.weight.device)
    masks.offset_bits = None if offset_bits is None else PackedTensor(offset_bits)
    table.add(masks)


def _head_of(model: nn.Module) -> nn.Module:
    found = [(name.count("."), name, module) for name, module in model.named_modules() if name.split(".")[-1] in HEADS]
    if not found:
        raise ConfigError(
            f"Expected a model with a classification head (named {' or '.join(map(repr, HEADS))}) to add offsets to, "
            f"found a {type(model).__name__} without one. Offsets are for classification and regression."
        )
    head: nn.Module = min(found, key=lambda each: each[:2])[2]
    return head


def _fitted(offsets: Tensor, output: Tensor) -> Tensor:
    """Offsets ``[1 or R, C]`` in the shape of outputs ``[B, ..., C]``, where each row stands for B / R examples."""
    if offsets.shape[1] != output.shape[-1]:
        raise ConfigError(
            f"Expected a head with {offsets.shape[1]} outputs, for which the profiles have offsets; found one with "
            f"{output.shape[-1]}. Load the base with as many labels as the profiles were trained with."
        )
    if len(offsets) > 1 and len(offsets) != len(output):
        offsets = offsets.repeat_interleave(len(output) // len(offsets), 0)
    shape = (len(offsets), *[1] * (output.dim() - 2), offsets.shape[1])
    return offsets.view(shape).to(output.device, output.dtype)
