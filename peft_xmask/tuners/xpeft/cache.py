"""Mixed adapters that outlive a forward pass."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.adapter import AdapterPair
from ...errors import ConfigError
from .mixing import ActiveAdapters, MixedRows, PoolSite, RowMasks

Entry = list[AdapterPair]
"""The mixed adapters of one row, site by site. It never changes, so a row that makes room stays whole for its users."""


class MixedAdapterCache:
    """An LRU cache of the mixed adapters of one adapter's rows, limited to ``max_bytes``. Threads may share it.

    With ``max_bytes=0`` it keeps what served the last whole batch, and nothing else.

    Args:
        sites: of the adapter, in order.
        max_bytes: for all rows at all sites.

    Attributes:
        last: what served the last whole batch without gradients.

    Raises:
        ConfigError: ``max_bytes`` is no whole number, or is too small for one row.
    """

    def __init__(self, sites: Sequence[PoolSite] = (), max_bytes: int = 0) -> None:
        self.sites, self.max_bytes = list(sites), max_bytes
        self.last: ActiveAdapters | None = None
        self._held = _Held(None, [])
        self._lock = threading.Lock()
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
            raise ConfigError(f"max_bytes={max_bytes!r} is invalid: expected a whole number of bytes.")
        if max_bytes and max_bytes < self.row_bytes:
            raise ConfigError(
                f"max_bytes={max_bytes:,} is too small: the mixed adapter of one profile takes {self.row_bytes:,} "
                "bytes. Pass at least as many, or 0 to switch the cache off."
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of one row at all sites."""
        return sum(site.pool.row_nbytes for site in self.sites)

    @property
    def nbytes(self) -> int:
        """Bytes that are held now."""
        return len(self) * self.row_bytes

    def __len__(self) -> int:
        """Rows that are held now."""
        return len(self._held.rows)

    def clear(self) -> None:
        """Forget all rows."""
        self.last, self._held = None, _Held(None, [])

    def find(self, rows: Tensor, source: tuple[Any, ...], masks_of: Callable[[Tensor], RowMasks]) -> MixedRows | None:
        """The mixed adapters of rows. Those that are not held are mixed, all at once.

        Args:
            rows: long ``[R]``, distinct.
            source: what masks are computed from. When it changes, or a pool moves, all that is held is out of date.
            masks_of: gives the masks of rows.

        Returns:
            None if there are more rows than fit, or if a pool is on the meta device until its module runs.

        Raises:
            MaskFormatError: invalid masks. Nothing is added then.
        """
        held = self._up_to_date(source)
        wanted: list[int] = rows.tolist()
        if len(wanted) > self.max_bytes // max(1, self.row_bytes) or any(pool.is_meta for pool in held.pools):
            return None
        with self._lock:
            found = {row: held.rows[row] for row in wanted if row in held.rows}
            for row in found:
                held.rows.move_to_end(row)
        missing = [row for row in wanted if row not in found]
        if missing:
            entries = self._mix(masks_of(torch.tensor(missing)), len(missing))
            found.update(zip(missing, entries, strict=True))
            with self._lock:
                held.rows.update(zip(missing, entries, strict=True))
                while len(held.rows) * self.row_bytes > self.max_bytes:
                    held.rows.popitem(last=False)
        return _FoundRows([found[row] for row in wanted])

    def _up_to_date(self, source: tuple[Any, ...]) -> _Held:
        held = self._held
        pools = [site.pool.down for site in self.sites]
        same_pools = len(held.pools) == len(pools) and all(a is b for a, b in zip(held.pools, pools, strict=True))
        if not (same_pools and same_source(held.source, source)):
            held = self._held = _Held(source, pools)
        return held

    def _mix(self, masks: RowMasks, count: int) -> list[Entry]:
        """Entries that share no memory: one that makes room gives all of its memory back."""
        with torch.inference_mode(False), torch.no_grad():
            mixed = [masks.at(site) for site in self.sites]
            return [[_row(pair, row) for pair in mixed] for row in range(count)]

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: nothing is held yet."""
        return {"sites": self.sites, "max_bytes": self.max_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See :meth:`__getstate__`."""
        self.sites, self.max_bytes = state["sites"], state["max_bytes"]
        self._lock = threading.Lock()
        self.clear()


class _Held:
    """What is held, and of what it was made. Another source gets another object, so no row enters the wrong one."""

    def __init__(self, source: tuple[Any, ...] | None, pools: list[Tensor]) -> None:
        self.source, self.pools = source, pools
        self.rows: OrderedDict[int, Entry] = OrderedDict()


class _FoundRows:
    """Entries as :class:`~peft_xmask.tuners.xpeft.mixing.MixedRows`."""

    def __init__(self, entries: list[Entry]) -> None:
        self._entries = entries

    def at(self, site: PoolSite) -> AdapterPair:
        pairs = [entry[site.index] for entry in self._entries]
        first = pairs[0]
        return AdapterPair(
            down=_stacked([pair.down for pair in pairs]),
            up=_stacked([pair.up for pair in pairs]),
            down_bias=None if first.down_bias is None else _stacked([_there(pair.down_bias) for pair in pairs]),
            up_bias=None if first.up_bias is None else _stacked([_there(pair.up_bias) for pair in pairs]),
        )


def _stacked(tensors: list[Tensor]) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def _there(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _row(pair: AdapterPair, row: int) -> AdapterPair:
    parts = (pair.down, pair.up, pair.down_bias, pair.up_bias)
    return AdapterPair(*(None if part is None else part[row].clone() for part in parts))  # type: ignore[arg-type]


def same_source(first: tuple[Any, ...] | None, second: tuple[Any, ...] | None) -> bool:
    """Whether mixed adapters were computed from the very same tensors with the same settings."""
    if first is None or second is None or len(first) != len(second):
        return False
    for a, b in zip(first, second, strict=True):  # noqa: SIM110  (a generator takes longer, here in every pass)
        if a is not b and (isinstance(a, Tensor) or a != b):
            return False
    return True
