"""From masks to the adapters of a forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ...core.adapter import AdapterPair
from ...core.masks import hard_weights, mix, scaled_rows, soft_mask
from ...core.packing import unpack_bits, unpack_halves
from ...pool import PoolSlice
from ...pool.common import added, one_after_the_other
from .spec import MaskSpec


class PoolSite(Protocol):
    """What one adapter has at one site: its slice of the pool (another object after a move), and the site's index."""

    pool: PoolSlice
    index: int


class ServedSite(PoolSite, Protocol):
    """A site in a model."""

    @property
    def down(self) -> Tensor:
        """The pool's down-projections, which are another tensor after a move or a cast."""


class MixedRows(Protocol):
    """Mixed adapters of R rows."""

    def at(self, site: PoolSite) -> AdapterPair:
        """Those of one site, with R as the first dimension."""


@dataclass(eq=False)
class RowMasks:
    """Masks and gains of R rows. Each call of :meth:`at` mixes the pool of one site with them.

    Shapes: ``mask [R, 2, S, N]``, ``gain [R, S]``.
    """

    mask: Tensor
    gain: Tensor

    def __post_init__(self) -> None:
        # for all sites at once, and before any block: a checkpointed one must find the same when it runs again
        self._weights = self.mask[:, 0].unbind(1), scaled_rows(self.mask[:, 1], self.gain).unbind(1)

    def at(self, site: PoolSite) -> AdapterPair:
        """Mix the pool of one site for every row; the gain goes into the up-projection.

        Around a common part inside the pair it goes into both projections: a gain of 0 is then the common part.
        """
        pool = site.pool
        down, up = (side[site.index] for side in self._weights)
        if pool.common_inside:
            down = down * self.gain[:, site.index, None]
        if pool.coefficients is not None:
            down, up = mix(down, pool.coefficients), mix(up, pool.coefficients)
        pair = AdapterPair(
            down=mix(down, pool.down),
            up=mix(up, pool.up),
            down_bias=None if pool.down_bias is None else mix(down, pool.down_bias),
            up_bias=None if pool.up_bias is None else mix(up, pool.up_bias),
        )
        return pair if pool.common is None else around_common(pair, pool.common, pool.common_inside)


def around_common(pair: AdapterPair, common: PoolSlice, inside: bool) -> AdapterPair:
    """Deviations of R rows put together with a common adapter, as one adapter for each row.

    Inside: the matrices are added. Beside: the bottlenecks stand one after the other, which gives
    ``B_0 act(A_0 x) + B act(A x)`` since the activation works on each number alone.

    Shapes: ``pair`` has R as its first dimension and a bottleneck of b; ``common`` has 1 and b_0. The result has R, and
    b (inside, where b = b_0) or b_0 + b.
    """
    if inside:
        return AdapterPair(
            down=common.down + pair.down,
            up=common.up + pair.up,
            down_bias=added(common.down_bias, pair.down_bias),
            up_bias=added(common.up_bias, pair.up_bias),
        )
    rows = pair.down.shape[0]
    down_bias = None
    if common.down_bias is not None or pair.down_bias is not None:
        first = common.down.new_zeros(1, common.down.shape[1]) if common.down_bias is None else common.down_bias
        second = pair.down.new_zeros(rows, pair.down.shape[1]) if pair.down_bias is None else pair.down_bias
        down_bias = one_after_the_other(first, second, rows, dim=1)
    up_bias = added(common.up_bias, pair.up_bias)
    return AdapterPair(
        down=one_after_the_other(common.down, pair.down, rows, dim=1),
        up=one_after_the_other(common.up, pair.up, rows, dim=2),
        down_bias=down_bias,
        up_bias=None if up_bias is None else up_bias.expand(rows, -1),
    )


@dataclass(eq=False)
class ActiveAdapters:
    """The mixed adapters that a forward pass uses.

    Attributes:
        mixed: adapters of R rows.
        index: ``[B]``, the row of each example; None: the rows in order.
        each: whether every example has its own adapter; otherwise the only row serves the whole batch.
        source: what they were computed from, see :meth:`~peft_xmask.tuners.xpeft.masks.AdapterMasks.source`; None: they
            serve this pass only.
    """

    mixed: MixedRows
    index: Tensor | None
    each: bool
    source: tuple[Any, ...] | None = None
    _pairs: dict[int, tuple[Tensor, AdapterPair]] = field(default_factory=dict)

    def pair(self, site: ServedSite) -> AdapterPair:
        """The adapters of one site. Without a gradient the result is kept for the next pass that uses this object.

        Shapes: those of :class:`~peft_xmask.core.adapter.AdapterPair`, with a batch dimension if ``each``.
        """
        kept = self._pairs.get(site.index)  # none in a graph, which makes an object for each pass
        if kept is not None and kept[0] is site.down:
            return kept[1]
        rows = self.mixed.at(site)
        pair = AdapterPair(
            down=self._spread(rows.down),
            up=self._spread(rows.up),
            down_bias=None if rows.down_bias is None else self._spread(rows.down_bias),
            up_bias=None if rows.up_bias is None else self._spread(rows.up_bias),
        )
        if not torch.compiler.is_compiling() and not pair.down.requires_grad:
            self._pairs[site.index] = (site.down, pair)
        return pair

    def _spread(self, mixed: Tensor) -> Tensor:
        """From one tensor for each row to one for each example, or to the only one. ``[R, ...] -> [B, ...]``."""
        if self.index is not None:
            mixed = mixed.index_select(0, self.index.to(mixed.device))
        return mixed if self.each else mixed[0]


def masks_from_bits(spec: MaskSpec, bits: Tensor, gain_bits: Tensor | None) -> RowMasks:
    """Masks and gains of shipped bytes, which the caller has checked.

    Shapes: as in :class:`~peft_xmask.tuners.xpeft.spec.MaskSpec`, with R rows.
    """
    if spec.mask_type == "hard":
        mask = hard_weights(unpack_bits(bits, spec.num_adapters), spec.top_k, spec.weighting)
    else:
        mask = soft_mask(unpack_halves(bits), weighting=spec.weighting)
    return RowMasks(mask, constant_gain(spec, mask) if gain_bits is None else unpack_halves(gain_bits)[..., 0])


def constant_gain(spec: MaskSpec, mask: Tensor) -> Tensor:
    """The gain of every site where none is learnt: ``scale``. Shape ``[R, S]``."""
    return torch.full((mask.shape[0], spec.num_sites), spec.scale, device=mask.device)
