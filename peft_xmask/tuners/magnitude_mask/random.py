"""Random positions that are the same on every machine, for masks selected by a seed."""

from __future__ import annotations

import numpy as np


def distinct(count: int, below: int, *, seed: int, stream: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """``count`` distinct integers from 0 to ``below - 1``, ascending, drawn uniformly.

    Drawn from the raw bits of NumPy's Philox generator, which never change, with the key ``(seed, stream)``.
    """
    if 2 * count > below:
        left_out = distinct(below - count, below, seed=seed, stream=stream)
        return np.setdiff1d(np.arange(below), left_out, assume_unique=True)
    bits = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64))
    drawn = np.empty(0, dtype=np.int64)
    while True:
        more = bits.random_raw(2 * count) % np.uint64(below)
        drawn = np.concatenate([drawn, more.astype(np.int64)])
        _, first = np.unique(drawn, return_index=True)
        if len(first) >= count:
            return np.sort(drawn[np.sort(first)[:count]])
