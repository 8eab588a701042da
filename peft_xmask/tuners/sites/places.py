"""Modules that can carry an adapter which reads activations: how wide they are, and where their features are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..base.experts import experts_width
from ..base.peft_private import BaseTunerLayer


@dataclass(frozen=True)
class Place:
    """A module as an adapter sees it.

    Attributes:
        in_features: width of the module's input; of an embedding, its number of tokens.
        out_features: width of the module's output.
        feature_axis: dimension of the features in the output, counted from the end: -1, or that of a convolution's
            channels.
        why_not_parallel: why an adapter cannot read the module's input; None if it can.
    """

    in_features: int
    out_features: int
    feature_axis: int = -1
    why_not_parallel: str | None = None


def place_of(module: nn.Module) -> Place | None:
    """What a module is to an adapter; None if it cannot carry one.

    At a convolution the adapter is applied at every position, to the channels: it is a convolution of kernel size 1
    behind the module. At an embedding it changes the vectors that come out.
    """
    if isinstance(module, nn.Embedding):
        return Place(
            module.num_embeddings, module.embedding_dim, why_not_parallel="its input are numbers of tokens, not vectors"
        )
    if isinstance(module, nn.modules.conv._ConvNd):
        return Place(
            module.in_channels,
            module.out_channels,
            -1 - len(module.kernel_size),
            why_not_parallel="its input and output can differ in size, so positions do not correspond",
        )
    widths = module_widths(module)
    return None if widths is None else Place(*widths)


def module_widths(module: nn.Module) -> tuple[int, int] | None:
    """Input and output width of a linear module, or of fused experts; None for any other module."""
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    widths = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(widths[0], int) and isinstance(widths[1], int) and not isinstance(module, BaseTunerLayer):
        return widths  # type: ignore[return-value]
    width = experts_width(module)
    return None if width is None else (width, width)


def device_of(module: nn.Module) -> torch.device | None:
    """Where a module's weight is; None if it has none or it is on the meta device."""
    weight = getattr(module, "weight", None)
    if weight is None:  # fused experts
        weight = next(module.parameters(recurse=False), None)
    return weight.device if isinstance(weight, Tensor) and not weight.is_meta else None
