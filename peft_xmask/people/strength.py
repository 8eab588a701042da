"""How strongly masks act: the strength, the same for all people, with the lowest validation loss; or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..bank.bank import ProfileBank
from ..core.packing import pack_halves, unpack_halves

STRENGTHS = (1.0, 0.5, 0.25)
"""Factors of the gains that are tried."""


@dataclass(frozen=True)
class Strength:
    """What was chosen.

    Attributes:
        value: factor of the gains; 0: masks are off.
        bank: with these gains.
    """

    value: float
    bank: ProfileBank


def choose_strength(bank: ProfileBank, without: Tensor, losses: Callable[[ProfileBank, float], Tensor]) -> Strength:
    """The strength that lowers the validation loss most, if it does so by more than the standard error; else 0.

    Args:
        bank: as it was trained.
        without: losses of the validation examples without masks, ``[n]``; empty: masks stay off.
        losses: called with a bank whose gains are scaled and the factor; gives the same examples' losses.
    """
    best, chosen = 0.0, Strength(0.0, scaled(bank, 0.0))
    for value in STRENGTHS if len(without) else ():
        candidate = scaled(bank, value)
        gains = without - losses(candidate, value)
        gain = float(gains.mean())
        error = float(gains.std()) / len(gains) ** 0.5 if len(gains) > 1 else float("inf")
        if gain > max(best, error):
            best, chosen = gain, Strength(value, candidate)
    return chosen


def scaled(bank: ProfileBank, factor: float) -> ProfileBank:
    """The bank with its gains multiplied by a factor, and without offsets."""
    content = bank.content()
    assert content.gain_bits is not None
    assert content.names is not None
    gains = pack_halves(unpack_halves(content.gain_bits) * factor)
    return ProfileBank(bank.config, content.bits, gains, content.names, content.shared)
