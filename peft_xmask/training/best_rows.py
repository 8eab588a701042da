"""Keep the best row of each profile, and decide when a profile stops."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import ConfigError


class BestRows:
    """Keeps, for each profile, the masks with the lowest validation loss, as they are shipped.

    A profile stops when ``patience`` evaluations in a row brought no loss below its best. One without validation
    examples never stops, and has its last row.

    Args:
        bits: uint8 ``[U, 2, S, W]``, the masks before training.
        gain_bits: uint8 ``[U, S, 2]``, or None.
        patience: None: no profile stops.

    Raises:
        ConfigError: a patience below 1.
    """

    def __init__(self, bits: Tensor, gain_bits: Tensor | None, patience: int | None) -> None:
        if patience is not None and patience < 1:
            raise ConfigError(f"patience={patience} is invalid: expected at least one evaluation, or None.")
        self.patience = patience
        self.bits, self.gain_bits = bits.clone(), None if gain_bits is None else gain_bits.clone()
        self.loss = torch.full((len(bits),), torch.inf, dtype=torch.float64)
        self.step = torch.full((len(bits),), -1)
        self.waited = torch.zeros(len(bits), dtype=torch.long)
        self.stopped_at = torch.full((len(bits),), -1)

    @property
    def stopped(self) -> Tensor:
        """Bool ``[U]``."""
        return self.stopped_at >= 0

    def update(self, losses: Tensor, bits: Tensor, gain_bits: Tensor | None, step: int) -> None:
        """Take in an evaluation.

        Args:
            losses: float64 ``[U]``; NaN of profiles that were not evaluated. One that is NaN because training diverged
                must be given as infinity.
            bits: the masks that were evaluated.
            gain_bits: their gains.
            step: of the optimizer.
        """
        judged = ~losses.isnan() & ~self.stopped
        better = judged & (losses < self.loss)
        self.bits[better] = bits[better]
        if self.gain_bits is not None and gain_bits is not None:
            self.gain_bits[better] = gain_bits[better]
        self.loss[better], self.step[better], self.waited[better] = losses[better], step, 0
        self.waited[judged & ~better] += 1
        if self.patience is not None:
            self.stopped_at[judged & (self.waited >= self.patience)] = step

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        found = {name: getattr(self, name) for name in ("bits", "loss", "step", "waited", "stopped_at")}
        return found if self.gain_bits is None else {**found, "gain_bits": self.gain_bits}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`tensors` gave."""
        for name in self.tensors():
            setattr(self, name, tensors[name].clone())
