"""A pool of the directions in which groups deviate, around what they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import ConfigError
from .common import CommonPart, remade
from .directions import Fitting, directions_of, mixing_coefficients
from .pool import AdapterPool
from .trained import TrainedAdapter, stack


def fitted_pool(
    adapters: Sequence[TrainedAdapter], size: int, principal: int, seed: int, facts: Mapping[str, Any]
) -> AdapterPool:
    """A pool around the mean of some adapters, with mixtures of the principal directions of their deviations.

    Args:
        adapters: one of each group, all trained from the same start, so that their differences are the groups'.
        size: directions of the pool, N.
        principal: K, of the principal directions; with G adapters at most G - 1.
        seed: of the mixtures.
        facts: what the pool's card says of the data; ``principal`` is added.

    Raises:
        ConfigError: fewer than two adapters, adapters that do not deviate, or a size that is too small.
    """
    if len(adapters) < 2:
        raise ConfigError(f"Expected adapters of at least two groups to fit a pool to, found {len(adapters)}.")
    like = stack("bottleneck", adapters, None)
    principal = min(principal, len(adapters) - 1)
    coefficients = mixing_coefficients(size, principal, seed)
    means, directions = {}, {}
    for name in like.sites:
        means[name], directions[name] = directions_of([each.sites[name] for each in adapters], principal)
    if not any(part.any() for site in directions.values() for _, part in site.parts()):
        raise ConfigError(
            "The groups' adapters are all the same, so there are no directions. Train them for more steps, or at a "
            "higher group_learning_rate."
        )
    names = tuple(f"direction {number}" for number in range(1, size + 1))
    common = remade(like, means, (f"mean of {len(adapters)} groups' adapters",))
    found = replace(remade(like, directions, names, mask_weighting="signed"), coefficients=coefficients)
    fitting = Fitting({**facts, "principal": principal}, coefficients)
    return AdapterPool(found, None, CommonPart(common, inside=True), fitting)
