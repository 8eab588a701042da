"""One profile: its masks as they are shipped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.packing import unpack_bits, unpack_halves
from ..tuners.xpeft.spec import MaskSpec


@dataclass(frozen=True, eq=False)
class Profile:
    """Masks and gains of one profile.

    Attributes:
        bits: uint8 ``[2, S, W]``, see :class:`~peft_xmask.tuners.xpeft.spec.MaskSpec`.
        gain_bits: uint8 ``[S, 2]``; None where gains are not learnt.
    """

    bits: Tensor
    gain_bits: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of masks and gains."""
        return self.bits.numel() + (0 if self.gain_bits is None else self.gain_bits.numel())

    @property
    def gains(self) -> Tensor | None:
        """Gain of each site, float32 ``[S]``."""
        return None if self.gain_bits is None else unpack_halves(self.gain_bits)[..., 0]

    def selected(self, spec: MaskSpec) -> Tensor:
        """Of a hard mask, which adapters are chosen: bool ``[2, S, N]``."""
        return unpack_bits(self.bits, spec.num_adapters)

    def __eq__(self, other: object) -> bool:
        """Whether masks and gains are the same, bit for bit."""
        if not isinstance(other, Profile) or (self.gain_bits is None) != (other.gain_bits is None):
            return NotImplemented if not isinstance(other, Profile) else False
        same_gains = self.gain_bits is None or other.gain_bits is None or torch.equal(self.gain_bits, other.gain_bits)
        return same_gains and torch.equal(self.bits, other.bits)

    __hash__ = None  # type: ignore[assignment]
