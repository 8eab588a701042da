"""One profile: its stored masks, gains and offsets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.packing import unpack_bits, unpack_halves
from ..tuners.xpeft.spec import MaskSpec


@dataclass(frozen=True, eq=False)
class Profile:
    """Masks, gains and offsets of one profile.

    Attributes:
        bits: uint8 ``[2, S, W]``, see :class:`~peft_xmask.tuners.xpeft.spec.MaskSpec`.
        gain_bits: uint8 ``[S, 2]``; None where gains are not learnt.
        offset_bits: uint8 ``[2 * C]``, half-precision numbers added to C outputs; None where profiles have no offsets.
    """

    bits: Tensor
    gain_bits: Tensor | None = None
    offset_bits: Tensor | None = None

    @property
    def parts(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Masks, gains and offsets: a row of each tensor that a bank has."""
        return self.bits, self.gain_bits, self.offset_bits

    @property
    def nbytes(self) -> int:
        """Bytes of masks, gains and offsets."""
        return sum(part.numel() for part in self.parts if part is not None)

    @property
    def gains(self) -> Tensor | None:
        """Gain of each site, float32 ``[S]``."""
        return None if self.gain_bits is None else unpack_halves(self.gain_bits)[..., 0]

    @property
    def offsets(self) -> Tensor | None:
        """The offset of each output, float32 ``[C]``."""
        return None if self.offset_bits is None else unpack_halves(self.offset_bits)

    def selected(self, spec: MaskSpec) -> Tensor:
        """Which adapters a hard mask chooses: bool ``[2, S, N]``."""
        return unpack_bits(self.bits, spec.num_adapters)

    def __eq__(self, other: object) -> bool:
        """Whether all bytes are the same."""
        if not isinstance(other, Profile):
            return NotImplemented
        return all(
            mine is theirs if mine is None or theirs is None else torch.equal(mine, theirs)
            for mine, theirs in zip(self.parts, other.parts, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]
