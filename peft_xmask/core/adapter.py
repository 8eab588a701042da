"""One adapter: two projections, the activation between them, and how it is applied at a site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "identity": lambda x: x,
        "relu": F.relu,
        "gelu": F.gelu,
        "silu": F.silu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
    }
)
"""Activations between the down- and the up-projection, by the name used in configs."""


@dataclass(frozen=True)
class AdapterPair:
    """One adapter: ``x -> up act(norm(down x + down_bias)) + up_bias``.

    Shapes: ``down [b, d_in]``, ``up [d_out, b]``, ``down_bias [b]``, ``up_bias [d_out]``. With a leading batch
    dimension on every field, it holds one adapter per example of a batch.
    """

    down: Tensor
    up: Tensor
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None


def adapt(x: Tensor, pair: AdapterPair, *, activation: str, layer_norm: bool, dropout: float = 0.0) -> Tensor:
    """Apply an adapter: ``up drop(act(norm(down x + down_bias))) + up_bias``.

    ``norm`` is a LayerNorm of width b without weights if ``layer_norm`` is true, else the identity; ``drop`` zeroes
    inputs of the up-projection with probability ``dropout``.

    Shapes: ``[..., d_in] -> [..., d_out]``; with a pair for each example ``[B, ..., d_in] -> [B, ..., d_out]``, or with
    R pairs for R runs of B / R examples each (the beams of a prompt).
    """
    hidden = _affine(x, pair.down, pair.down_bias)
    if layer_norm:
        hidden = F.layer_norm(hidden, hidden.shape[-1:])
    hidden = ACTIVATIONS[activation](hidden)
    if dropout > 0.0:
        hidden = F.dropout(hidden, dropout)
    return _affine(hidden, pair.up, pair.up_bias)


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    rows = x.reshape(weight.shape[0], -1, x.shape[-1])
    out = torch.bmm(rows, weight.transpose(1, 2))
    if bias is not None:
        out = out + bias.unsqueeze(1)
    return out.view(*x.shape[:-1], weight.shape[1])


INSERTION_FORMS = ("sequential", "parallel")
"""Where an adapter reads: the module's output, or its input (PEFT-Ref's words)."""


@dataclass(frozen=True)
class AdapterForm:
    """How an adapter is applied at a site.

    Attributes:
        activation: name in :data:`peft_xmask.core.adapter.ACTIVATIONS`.
        layer_norm: whether a LayerNorm precedes the activation.
        insertion_form: ``"sequential"`` or ``"parallel"``.
    """

    activation: str = "relu"
    layer_norm: bool = False
    insertion_form: str = "sequential"

    @property
    def linear(self) -> bool:
        """Whether the adapter is a linear map, and can therefore be merged."""
        return self.activation == "identity" and not self.layer_norm
