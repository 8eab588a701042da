"""The directions of a fitted pool: random mixtures of the principal directions in which groups deviate.

Of G groups' deviations from the common adapter, the first K principal directions are kept, each as long as the groups'
standard deviation along it. The pool's N directions are random mixtures of these K: with N much larger than K, a mask
of N bits can approximate any K real coefficients, and no bit is spent on a direction in which nobody deviates. The
mixtures are never made: the pool has the K directions and the coefficients, and a mask is turned into K numbers first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .trained import SiteTensors

_ALIGNED = 0.8
"""The largest sum of N standard normal numbers with free signs, over N."""
_SIDES = (("down", "down_bias"), ("up", "up_bias"))
"""Parts of an adapter that one mask moves together."""


@dataclass(frozen=True)
class Fitting:
    """What a pool was fitted to, and how its directions are composed.

    Attributes:
        facts: on what the pool was grown, and with which settings; of types that JSON has.
        coefficients: float32 ``[N, K]``: of each direction, its coefficients on the K principal directions, in standard
            deviations of the groups. They are the same at every site, and for both projections. The coefficients of a
            mask with weights m and gain g are ``g * m @ coefficients``; a group's are about standard normal.
    """

    facts: Mapping[str, Any]
    coefficients: Tensor

    @property
    def principal(self) -> int:
        """K."""
        return int(self.coefficients.shape[1])


def mixing_coefficients(size: int, principal: int, seed: int) -> Tensor:
    """Coefficients of N random mixtures of K directions, float32 ``[N, K]``.

    The columns are orthogonal. The first N // 2 rows sum to zero, and so do the others: the mask that profiles start
    from, which selects the first half, is no deviation at all. They are scaled for masks of weights ``+-1 / sqrt(N)``
    and a gain of 1: a mask that follows a gradient as closely as signs can has coefficients of 2-norm sqrt(K), as far
    from the common part as the groups are.

    Args:
        size: N.
        principal: K.
        seed: of the mixtures.

    Raises:
        ConfigError: too few mixtures for so many directions.
    """
    half = size // 2
    if not 1 <= principal < half:
        raise ConfigError(
            f"size={size} is too small for {principal} principal directions: expected at least {2 * principal + 2}, or "
            "a smaller principal=."
        )
    drawn = torch.randn(size, principal, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    halves = [part - part.mean(0) for part in (drawn[:half], drawn[half:])]
    columns, triangle = torch.linalg.qr(torch.cat(halves))
    scaled: Tensor = columns * triangle.diagonal().sign() * (principal**0.5 / _ALIGNED)
    return scaled.float()


def principal_directions(deviations: Tensor, count: int) -> Tensor:
    """The principal directions of G deviations, each as long as the standard deviation along it.

    Shapes: centred ``[G, d] -> [count, d]``; rows beyond the rank are zero.
    """
    values = deviations.double()
    found, left = torch.linalg.eigh(values @ values.t())
    found, left = found.flip(0)[:count].clamp_min(0), left.flip(1)[:, :count]
    sizes = (found / max(1, len(values) - 1)).sqrt()
    there = found > found.max() * 1e-9
    rows = left.t() @ values / found.sqrt().clamp_min(1e-30).unsqueeze(1)
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
    scaled = torch.where(there.unsqueeze(1), rows * largest * sizes.unsqueeze(1), 0.0)
    return torch.cat([scaled, scaled.new_zeros(count - len(scaled), scaled.shape[1])]).float()


def directions_of(members: Sequence[SiteTensors], count: int) -> tuple[SiteTensors, SiteTensors]:
    """The mean of one site's adapters, and the principal directions in which they deviate from it.

    Args:
        members: adapters of G groups.
        count: K.

    Returns:
        The mean, as a stack of one; and the directions, as a stack of K.
    """
    stacked = {name: torch.stack([getattr(each, name).double() for each in members]) for name, _ in members[0].parts()}
    means = {name: values.mean(0, keepdim=True) for name, values in stacked.items()}
    directions: dict[str, Tensor] = {}
    for side in _SIDES:
        names = [name for name in side if name in stacked]
        flat = torch.cat([(stacked[name] - means[name]).flatten(1) for name in names], dim=1)
        found = principal_directions(flat, count)
        widths = [means[name].numel() for name in names]
        for name, part in zip(names, found.split(widths, dim=1), strict=True):
            directions[name] = part.reshape(-1, *means[name].shape[1:])
    return SiteTensors(**{name: mean.float() for name, mean in means.items()}), SiteTensors(**directions)
