"""The common part of a pool: one adapter per site that is always on, around which masks mix deviations.

There are two ways to put them together, and a pool says which:

- **Inside** the pair, for deviations from the common adapter itself (a centred or fitted pool):
  ``A = A_0 + g sum m_A[i] A_i``, ``B = B_0 + g sum m_B[i] B_i``, then ``y + B act(A y)``. The cross terms ``B_0 A_i``
  and ``B_i A_0`` are what makes a mask move the common adapter a little; without them a small deviation would be a
  product of two small numbers. The gain g multiplies both sums, so that a gain of 0 is the common adapter.
- **Beside** the mix, for directions that have nothing to do with it (a random pool, another width):
  ``y + B_0 act(A_0 y) + g (sum m_B[i] B_i) act((sum m_A[i] A_i) y)``. Each side has its own bottleneck. Since ``act``
  works on each number alone, this is one adapter whose bottleneck is both, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.fingerprint import digest_of_facts
from ..core.sites import Site
from ..errors import ConfigError
from .random import RandomAdapters
from .slice import PoolSlice
from .trained import SiteTensors, TrainedAdapter, TrainedAdapters, norm_of, stack


@dataclass(frozen=True)
class CommonPart:
    """An always-on adapter.

    Attributes:
        adapter: a stack of one.
        inside: whether it is added to the mixed matrices; otherwise it stands beside the mix.
    """

    adapter: TrainedAdapters
    inside: bool

    @property
    def source(self) -> str:
        """Where it came from."""
        return self.adapter.sources[0]

    def fingerprint_around(self, directions: str) -> str:
        """The fingerprint of a pool, given that of its directions."""
        return digest_of_facts({"directions": directions, "common": self.adapter.fingerprint, "inside": self.inside})

    def bind(self, sites: Sequence[Site], directions: Sequence[PoolSlice]) -> list[PoolSlice]:
        """The slices of a pool's directions, with this around them."""
        commons = self.adapter.bind(sites)
        return [part.around(common, self.inside) for part, common in zip(directions, commons, strict=True)]


def beside(directions: RandomAdapters | TrainedAdapters, adapter: TrainedAdapter) -> CommonPart:
    """The common part that an adapter is to directions of any kind.

    Raises:
        ConfigError: a LayerNorm, which cannot span two bottlenecks, or an adapter of another form than the directions.
    """
    if adapter.layer_norm or directions.layer_norm:
        raise ConfigError(
            "A common adapter beside a pool is invalid with layer_norm: the norm of both bottlenecks together would be "
            "another one. Pass an adapter without layer_norm."
        )
    for name in ("insertion_form", "activation"):
        wanted, found = getattr(directions, name), getattr(adapter, name)
        if wanted not in (None, found):
            raise ConfigError(
                f"The common adapter '{adapter.source}' has {name}={found!r}, the pool {wanted!r}. Pass an adapter of "
                "the pool's form."
            )
    kind = "lora" if adapter.insertion_form == "parallel" and adapter.activation == "identity" else "bottleneck"
    return CommonPart(stack(kind, [adapter], directions.dtype), inside=False)


def centre(adapters: TrainedAdapters) -> tuple[TrainedAdapters, CommonPart]:
    """Split adapters into their mean, which is inside the pair, and their deviations from it.

    Raises:
        ConfigError: fewer than two adapters, whose deviations are all zero.
    """
    if adapters.num_adapters < 2:
        raise ConfigError(
            "Centring a pool of one adapter leaves no directions. Pass at least two adapters, or centre=False."
        )
    means, deviations = {}, {}
    for name, site in adapters.sites.items():
        parts = {part: tensor.float().mean(0, keepdim=True) for part, tensor in site.parts()}
        means[name] = SiteTensors(**{part: mean.to(adapters.dtype) for part, mean in parts.items()})
        deviations[name] = SiteTensors(
            **{part: (tensor.float() - parts[part]).to(adapters.dtype) for part, tensor in site.parts()}
        )
    count = adapters.num_adapters
    directions = remade(adapters, deviations, adapters.sources, mask_weighting="signed")
    common = remade(adapters, means, (f"mean of {count} adapters",))
    return directions, CommonPart(common, inside=True)


class _Unique:
    """Equal only to itself: the identity of tensors created in this process."""


def remade(
    like: TrainedAdapters, sites: dict[str, SiteTensors], sources: tuple[str, ...], mask_weighting: str = "mean"
) -> TrainedAdapters:
    """Adapters of the same form with other tensors."""
    norms = tuple(norm_of([tensor]) for site in sites.values() for _, tensor in site.parts())
    return replace(like, sites=sites, sources=sources, norms=norms, identity=_Unique(), mask_weighting=mask_weighting)


def added(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Their sum, where either may be missing."""
    if first is None or second is None:
        return first if second is None else second
    return first + second


def one_after_the_other(first: Tensor, second: Tensor, rows: int, dim: int) -> Tensor:
    """A common tensor ``[1, ...]`` for each of R rows, and the row's own tensor ``[R, ...]``, along a dimension."""
    return torch.cat([first.expand(rows, *first.shape[1:]), second], dim=dim)
