"""Masks ready to mix a pool with, from what is trained or from what is shipped."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import hard_mask, mask_weight, scaled_gain, soft_mask
from ..packing import unpack_bits, unpack_halves
from .spec import MaskSpec


@dataclass(eq=False)
class Mixing:
    """Masks ready to mix with: R distinct rows, and which of them each example of the batch uses.

    Shapes: ``mask [R, 2, S, N]``, ``gain [R, S]``, ``index [B]`` or None when one row serves the whole batch.
    ``rows``, ``state`` and ``sources`` say what it was computed from, and so how long it holds.
    """

    mask: Tensor
    gain: Tensor
    index: Tensor | None
    rows: int | Tensor = 0
    state: tuple[Any, ...] = ()
    sources: list[tuple[nn.Module, Tensor, int | None, torch.dtype, torch.device]] = field(default_factory=list)

    def spread(self, mixed: Tensor) -> Tensor:
        """From one tensor per distinct row to one per example, or to the only one. ``[R, ...] -> [B, ...]``."""
        return mixed[0] if self.index is None else mixed.index_select(0, self.index.to(mixed.device))


def masks_from_logits(
    spec: MaskSpec, logits: Tensor, gain: Tensor | None, *, temperature: float, logit_scale: float
) -> tuple[Tensor, Tensor]:
    """Masks and gains of trained values.

    Shapes: ``logits [R, 2, S, N]``, ``gain [R, S]`` or None; returns ``mask [R, 2, S, N]``, ``gain [R, S]``.
    """
    softness = temperature / logit_scale
    if spec.mask_type == "hard":
        mask = hard_mask(logits, spec.top_k, estimator=spec.estimator, norm=spec.norm, temperature=softness)
    else:
        mask = soft_mask(logits, norm=spec.norm, temperature=softness)
    return mask, constant_gain(spec, mask) if gain is None else scaled_gain(gain, spec.scale, logit_scale)


def masks_from_bits(spec: MaskSpec, bits: Tensor, gain_bits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Masks and gains of shipped bytes, which the caller has checked.

    Shapes: as in :class:`~peft_xmask.xpeft.spec.MaskSpec`; returns ``mask [R, 2, S, N]``, ``gain [R, S]``.
    """
    if spec.mask_type == "hard":
        mask = unpack_bits(bits, spec.num_adapters).float() * mask_weight(spec.top_k, spec.norm)
    else:
        mask = soft_mask(unpack_halves(bits), norm=spec.norm)
    return mask, constant_gain(spec, mask) if gain_bits is None else unpack_halves(gain_bits)[..., 0]


def constant_gain(spec: MaskSpec, mask: Tensor) -> Tensor:
    """The gain of every site where none is learnt: ``scale``. Shape ``[R, S]``."""
    return torch.full((mask.shape[0], spec.num_sites), spec.scale, device=mask.device)
