"""Which examples of which profiles a step sees."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..errors import ConfigError

_SORTED_BATCHES = 50  # examples of so many batches are sorted by length together, as the Trainer does


def draws_per_epoch(counts: Tensor, temperature: float, max_passes: float) -> Tensor:
    """How many examples of each profile an epoch draws.

    ``d_u = min(N n_u^(1/T) / sum_v n_v^(1/T), c n_u)`` with n_u examples of profile u, N of all, temperature T and at
    most c passes over a profile's examples. T = 1 draws every example once; the higher T is, the more alike profiles
    with few and with many examples are.

    Shapes: ``[U] -> [U]``, float64.
    """
    counts = counts.double()
    weights = torch.where(counts > 0, counts ** (1.0 / temperature), 0.0)
    return torch.minimum(weights * (counts.sum() / weights.sum()), counts * max_passes)


class ProfileBatchSampler(Sampler[list[int]]):
    """Batches of examples of mixed profiles, the same for the same seed and epoch.

    An epoch draws from each profile as :func:`draws_per_epoch` says (a fraction by chance), goes through its examples
    in whole passes and, for the rest, draws without replacement. All draws are shuffled and cut into batches. Examples
    of profiles that have ``stopped`` then leave their batches: those that go on see exactly what they would have seen.
    Each process gets its part of every batch, and at least one example: where fewer are left than there are processes,
    examples of profiles that have stopped fill it up, and if need be examples come twice.

    Args:
        rows: long ``[n]``, the row of each example's profile.
        batch_size: of a step in all processes together, before profiles stop.
        temperature: T.
        max_passes: c.
        seed: of the draws.
        part: which process this is, from 0, and how many there are.
        lengths: long ``[n]``, tokens of each example: a batch then has examples of about the same length, so that
            there is less padding to compute. Which examples an epoch draws does not change. None: batches are random.

    Attributes:
        rows: as given.
        stopped: bool ``[U]``, read when an epoch begins.

    Raises:
        ConfigError: a number is invalid, or there are no examples.
    """

    def __init__(
        self,
        rows: Tensor,
        batch_size: int,
        *,
        temperature: float,
        max_passes: float,
        seed: int,
        part: tuple[int, int] = (0, 1),
        lengths: Tensor | None = None,
    ) -> None:
        for name, value, least in (("temperature", temperature, 1.0), ("max_passes", max_passes, 1.0)):
            if not value >= least:
                raise ConfigError(f"{name}={value!r} is invalid: expected a number of at least {least:g}.")
        if not len(rows):
            raise ConfigError("Expected at least one example, found none.")
        self.batch_size, self.seed, self.epoch, self.drop_last = batch_size, seed, 0, False
        self.rows, self.part, self.lengths = rows, part, lengths
        self._counts = torch.bincount(rows)
        self._draws = draws_per_epoch(self._counts, temperature, max_passes)
        self._size = int(self._draws.sum().round().clamp_min(1))
        self.stopped = torch.zeros(len(self._counts), dtype=torch.bool)

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is that of this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Steps of an epoch."""
        return math.ceil(self._size / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        drawn = self._draw()
        number, processes = self.part
        active = ~self.stopped[self.rows]
        for batch in self._batches(drawn):
            kept = batch[active[batch]]
            if len(kept) < processes:
                filled = torch.cat([kept, batch[~active[batch]]])
                kept = filled.repeat(-(-processes // len(filled)))[:processes]
            yield kept[number::processes].tolist()

    def _batches(self, drawn: Tensor) -> list[Tensor]:
        """Drawn examples cut into batches: sorted by length within parts of many batches, if lengths are known."""
        if self.lengths is None:
            return list(torch.tensor_split(drawn, len(self)))
        parts = drawn.split(_SORTED_BATCHES * self.batch_size)
        ordered = torch.cat([part[torch.argsort(self.lengths[part], stable=True)] for part in parts])
        batches = torch.tensor_split(ordered, len(self))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]

    def _draw(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        whole = self._draws.floor()
        chance = torch.rand(len(whole), generator=generator, dtype=torch.float64)
        wanted = (whole + (chance < self._draws - whole)).long()
        wanted[self._counts > 0] = wanted[self._counts > 0].clamp_min(1)
        shuffled = torch.randperm(len(self.rows), generator=generator)
        order = shuffled[torch.argsort(self.rows[shuffled], stable=True)]  # by profile, shuffled within
        starts = torch.cumsum(self._counts, 0) - self._counts
        rank = torch.arange(len(order)) - starts[self.rows[order]]
        passes, rest = wanted // self._counts.clamp_min(1), wanted % self._counts.clamp_min(1)
        times = passes[self.rows[order]] + (rank < rest[self.rows[order]])
        drawn = order.repeat_interleave(times)
        return drawn[torch.randperm(len(drawn), generator=generator)]
