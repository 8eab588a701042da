"""From masks to the adapters in force: masks of rows, the pool mixed with them, and which example uses which mix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...core.adapter import AdapterPair
from ...core.masks import hard_mask, hard_weights, mix, scaled_gain, soft_mask
from ...core.packing import unpack_bits, unpack_halves
from ...pool import PoolSlice
from .spec import MaskSpec

Source = tuple[nn.Module, Tensor, int | None, torch.dtype, torch.device]
"""Where masks come from: a module, its weight, and that tensor's version, dtype and device."""


class Site(Protocol):
    """What one adapter has at one site: its slice of the pool, now and after it was moved, and the site's place."""

    pool: PoolSlice
    index: int


class MixedRows(Protocol):
    """Mixed adapters of R rows."""

    def fit(self, site: Site) -> bool:
        """Whether they are still of the pool that the site has now."""

    def at(self, site: Site) -> AdapterPair:
        """Those of one site, with R as the first dimension."""


@dataclass(eq=False)
class Masks:
    """Masks and gains of R rows: mixed adapters that are made when they are asked for.

    Shapes: ``mask [R, 2, S, N]``, ``gain [R, S]``.
    """

    mask: Tensor
    gain: Tensor

    def fit(self, site: Site) -> bool:
        """True: they are mixed when they are asked for."""
        return True

    def at(self, site: Site) -> AdapterPair:
        """Mix the pool of one site for every row; the gain goes into the up-projection."""
        pool = site.pool
        down = self.mask[:, 0, site.index]
        up = self.mask[:, 1, site.index] * self.gain[:, site.index, None]
        return AdapterPair(
            down=mix(down, pool.down),
            up=mix(up, pool.up),
            down_bias=None if pool.down_bias is None else mix(down, pool.down_bias),
            up_bias=None if pool.up_bias is None else mix(up, pool.up_bias),
        )


@dataclass(eq=False)
class Mixing:
    """The adapters in force: those of some rows, and which of them each example of the batch uses.

    Attributes:
        mixed: adapters of R rows.
        index: ``[B]``, which of them; None: all of them, in order.
        each: whether there is one for each example. If not, one row serves the whole batch.
        rows: with ``state`` and ``sources``, what it was computed from, and so how long it holds.
    """

    mixed: MixedRows
    index: Tensor | None
    each: bool
    rows: int | Tensor = 0
    state: tuple[Any, ...] = ()
    sources: list[Source] = field(default_factory=list)
    _baked: dict[int, tuple[Tensor, AdapterPair]] = field(default_factory=dict)

    def pair(self, site: Site) -> AdapterPair:
        """The adapters of one site; where no gradient is wanted, the result is kept for the next pass.

        Shapes: those of :class:`~peft_xmask.core.adapter.AdapterPair`, with a batch dimension if there is one for each
        example.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling:
            baked = self._baked.get(site.index)
            if baked is not None and baked[0] is site.pool.down:
                return baked[1]
        rows = self.mixed.at(site)
        pair = AdapterPair(
            down=self._spread(rows.down),
            up=self._spread(rows.up),
            down_bias=None if rows.down_bias is None else self._spread(rows.down_bias),
            up_bias=None if rows.up_bias is None else self._spread(rows.up_bias),
        )
        if not compiling and not pair.down.requires_grad:
            self._baked[site.index] = (site.pool.down, pair)
        return pair

    def _spread(self, mixed: Tensor) -> Tensor:
        """From one tensor for each row to one for each example, or to the only one. ``[R, ...] -> [B, ...]``."""
        if self.index is not None:
            mixed = mixed.index_select(0, self.index.to(mixed.device))
        return mixed if self.each else mixed[0]


def masks_from_logits(
    spec: MaskSpec, logits: Tensor, gain: Tensor | None, *, temperature: float, logit_scale: float
) -> Masks:
    """Masks and gains of trained values.

    Shapes: ``logits [R, 2, S, N]``, ``gain [R, S]`` or None.
    """
    softness = temperature / logit_scale
    if spec.mask_type == "hard":
        mask = hard_mask(logits, spec.top_k, estimator=spec.estimator, norm=spec.norm, temperature=softness)
    else:
        mask = soft_mask(logits, norm=spec.norm, temperature=softness)
    return Masks(mask, constant_gain(spec, mask) if gain is None else scaled_gain(gain, spec.scale, logit_scale))


def masks_from_bits(spec: MaskSpec, bits: Tensor, gain_bits: Tensor | None) -> Masks:
    """Masks and gains of shipped bytes, which the caller has checked.

    Shapes: as in :class:`~peft_xmask.tuners.xpeft.spec.MaskSpec`, with R rows.
    """
    if spec.mask_type == "hard":
        mask = hard_weights(unpack_bits(bits, spec.num_adapters), spec.top_k, spec.norm)
    else:
        mask = soft_mask(unpack_halves(bits), norm=spec.norm)
    return Masks(mask, constant_gain(spec, mask) if gain_bits is None else unpack_halves(gain_bits)[..., 0])


def constant_gain(spec: MaskSpec, mask: Tensor) -> Tensor:
    """The gain of every site where none is learnt: ``scale``. Shape ``[R, S]``."""
    return torch.full((mask.shape[0], spec.num_sites), spec.scale, device=mask.device)
