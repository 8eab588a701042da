"""Weighted sums of adapters' vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import ConfigError
from ..base.config import require_choice

COMBINATIONS = ("avg", "linear")


def combine(vectors: Sequence[Tensor], weights: Sequence[float], combination: str) -> Tensor:
    """``sum_i w_i v_i``, for ``"avg"`` divided by ``sum_i w_i``; added in float64, rounded once.

    Shapes: all alike, which is that of the result.

    Raises:
        ConfigError: an unknown combination, another number of weights than of vectors, weights that are not finite, or,
            for ``"avg"``, weights that add up to zero.
    """
    require_choice("combination_type", combination, COMBINATIONS)
    if len(weights) != len(vectors) or not vectors:
        raise ConfigError(f"Expected one weight for each adapter, found {len(weights)} for {len(vectors)} adapters.")
    factors = torch.tensor(list(weights), dtype=torch.float64)
    total = factors.sum() if combination == "avg" else torch.ones(())
    if not factors.isfinite().all() or total == 0:
        raise ConfigError(f"weights={list(weights)} is invalid: expected finite numbers that do not cancel out.")
    stacked = torch.stack([vector.detach().cpu().double().flatten() for vector in vectors])
    return ((factors / total) @ stacked).view(vectors[0].shape).to(vectors[0].device, vectors[0].dtype)
