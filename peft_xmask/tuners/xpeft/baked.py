"""Mixed adapters of the rows that were used last, so that they need no mixing again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.adapter import AdapterPair
from ...errors import ConfigError
from ...pool import PoolSlice
from .mixing import Masks, Site


class BakedRows:
    """Mixed adapters of rows of one adapter in slots of equal size, at most so many bytes of them.

    A row has the same slot at every site. The rows that were used longest ago make room.

    Args:
        sites: of the adapter, in order.
        max_bytes: for all slots at all sites.

    Raises:
        ConfigError: not even one row fits.
    """

    def __init__(self, sites: Sequence[Site], max_bytes: int) -> None:
        self.sites, self.max_bytes = list(sites), max_bytes
        self.clear()
        if max_bytes < self.row_bytes:
            raise ConfigError(
                f"max_bytes={max_bytes:,} is too small: the mixed adapter of one profile takes {self.row_bytes:,} "
                "bytes. Expected at least as many, or 0 for none."
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of one row at all sites."""
        return sum(site.pool.nbytes // site.pool.down.shape[0] for site in self.sites)

    @property
    def nbytes(self) -> int:
        """Bytes that are held now."""
        return sum(tensor.nbytes for slab in self._slabs for tensor in _tensors(slab))

    def __len__(self) -> int:
        """Rows that are held now."""
        return len(self._slots)

    def clear(self) -> None:
        """Forget all rows and give their memory back."""
        self._slabs: list[AdapterPair] = []
        self._slots: OrderedDict[int, int] = OrderedDict()
        self._free: list[int] = []
        self._pools: list[Tensor] = []
        self._made_of: tuple[list[Tensor], Any] = ([], None)

    def find(
        self, rows: Tensor, weights: list[Tensor], facts: Any, masks_of: Callable[[Tensor], Masks], num_rows: int
    ) -> Tensor | None:
        """Slots of rows. Those that are not held are mixed, all at once.

        Args:
            rows: long ``[R]``, distinct.
            weights: what masks are computed from. If one of them is another tensor than last time, or ``facts`` are
                others, or a pool was moved, all that is held is out of date.
            facts: whatever else masks depend on.
            masks_of: masks of rows.
            num_rows: that there are in all.

        Returns:
            long ``[R]``; None where there are more rows than slots.

        Raises:
            MaskFormatError: masks that are none.
        """
        pools = [site.pool.down for site in self.sites]
        if not (self._made_of[1] == facts and _same(self._made_of[0], weights) and _same(self._pools, pools)):
            self.clear()
            if any(pool.is_meta for pool in pools):  # elsewhere until its module runs
                return None
            self._allocate(num_rows)
            self._pools, self._made_of = pools, (weights, facts)
        wanted: list[int] = rows.tolist()
        if len(wanted) > len(self._slots) + len(self._free):
            return None
        for row in wanted:
            if row in self._slots:
                self._slots.move_to_end(row)
        missing = [row for row in wanted if row not in self._slots]
        if missing:
            self._bake(missing, masks_of(torch.tensor(missing)))
        return torch.tensor([self._slots[row] for row in wanted])

    def fit(self, site: Site) -> bool:
        """Whether the site's pool is the one that was mixed."""
        return self._pools[site.index] is site.pool.down

    def at(self, site: Site) -> AdapterPair:
        """What all slots hold at one site: with the slots as the first dimension."""
        return self._slabs[site.index]

    def _allocate(self, num_rows: int) -> None:
        count = min(self.max_bytes // self.row_bytes, num_rows)
        with torch.inference_mode(False):
            self._slabs = [_empty(site.pool, count) for site in self.sites]
        self._free = list(range(count))

    def _bake(self, rows: list[int], masks: Masks) -> None:
        """Slots are taken only when every site has its adapters: a failure on the way loses rows, and mixes up none."""
        while len(self._free) < len(rows):
            self._free.append(self._slots.popitem(last=False)[1])
        slots = torch.tensor(self._free[: len(rows)])
        for site, slab in zip(self.sites, self._slabs, strict=True):
            for held, mixed in zip(_tensors(slab), _tensors(masks.at(site)), strict=True):
                held.index_copy_(0, slots.to(held.device), mixed)
        del self._free[: len(rows)]
        self._slots.update(zip(rows, slots.tolist(), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: nothing is held yet."""
        empty: dict[str, Any] = {
            "_slabs": [],
            "_slots": OrderedDict(),
            "_free": [],
            "_pools": [],
            "_made_of": ([], None),
        }
        return {**self.__dict__, **empty}


def _empty(pool: PoolSlice, count: int) -> AdapterPair:
    def rows(tensor: Tensor) -> Tensor:
        return torch.empty(count, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)

    return AdapterPair(
        down=rows(pool.down),
        up=rows(pool.up),
        down_bias=None if pool.down_bias is None else rows(pool.down_bias),
        up_bias=None if pool.up_bias is None else rows(pool.up_bias),
    )


def _tensors(pair: AdapterPair) -> list[Tensor]:
    return [tensor for tensor in (pair.down, pair.up, pair.down_bias, pair.up_bias) if tensor is not None]


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(one is other for one, other in zip(first, second, strict=True))
