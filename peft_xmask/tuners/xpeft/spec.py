"""What the masks of one adapter are, and what their bytes must look like."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.masks import require
from ...core.packing import check_bits, packed_size, unpack_bits, unpack_halves
from ...errors import MaskFormatError


@dataclass(frozen=True)
class MaskSpec:
    """What the masks of one adapter are: P profiles, S sites, N adapters, and how logits become masks.

    Shapes of the bytes: hard masks ``[P, 2, S, ceil(N / 8)]``, soft masks ``[P, 2, S, 2 * N]`` (half-precision logits),
    gains ``[P, S, 2]`` (half-precision numbers).
    """

    num_profiles: int
    num_sites: int
    num_adapters: int
    mask_type: str
    top_k: int
    weighting: str
    estimator: str
    scale: float
    learn_gain: bool

    @property
    def logits_shape(self) -> tuple[int, int, int, int]:
        """``(P, 2, S, N)``."""
        return self.num_profiles, 2, self.num_sites, self.num_adapters

    @property
    def bits_shape(self) -> tuple[int, int, int, int]:
        """Shape of the shipped masks."""
        width = packed_size(self.num_adapters) if self.mask_type == "hard" else 2 * self.num_adapters
        return self.num_profiles, 2, self.num_sites, width

    @property
    def gain_shape(self) -> tuple[int, int, int]:
        """Shape of the shipped gains."""
        return self.num_profiles, self.num_sites, 2

    def check(self, bits: Tensor, gain_bits: Tensor | None) -> None:
        """Refuse bytes that are not masks of this kind. Any number of profiles is accepted in the first dimension.

        Raises:
            MaskFormatError: another shape or dtype, masks that are not exactly k of N, numbers that are not finite.
        """
        self.check_shapes(bits, gain_bits)
        if self.mask_type == "hard":
            check_bits(bits, self.num_adapters, self.top_k)
        elif not unpack_halves(bits).isfinite().all():
            raise MaskFormatError("Expected finite logits in a soft mask, found NaN or infinity. The file is damaged.")
        if gain_bits is not None and not unpack_halves(gain_bits).isfinite().all():
            raise MaskFormatError("Expected finite gains, found NaN or infinity. The file is damaged.")

    def check_in_graph(self, bits: Tensor, gain_bits: Tensor | None) -> None:
        """As :meth:`check`, for ``torch.compile``: values are asserted when the graph runs.

        Raises:
            MaskFormatError: another shape or dtype.
            RuntimeError: when the graph runs, for bytes that are no masks.
        """
        self.check_shapes(bits, gain_bits)
        if self.mask_type == "hard":
            ones = unpack_bits(bits, bits.shape[-1] * 8)
            sound = (ones.sum(-1) == self.top_k).all() & ~ones[..., self.num_adapters :].any()
        else:
            sound = unpack_halves(bits).isfinite().all()
        if gain_bits is not None:
            sound = sound & unpack_halves(gain_bits).isfinite().all()
        require(
            sound, MaskFormatError("The bytes of an adapter's masks are not masks of its kind: its file is damaged.")
        )

    def check_shapes(self, bits: Tensor, gain_bits: Tensor | None) -> None:
        """Refuse bytes of another shape or dtype, whatever is in them.

        Raises:
            MaskFormatError: they are not.
        """
        for name, found, shape in (("bits", bits, self.bits_shape), ("gain_bits", gain_bits, self.gain_shape)):
            if found is None:
                continue
            if found.dtype != torch.uint8 or tuple(found.shape[1:]) != shape[1:]:
                raise MaskFormatError(
                    f"Expected {name} as uint8 of shape {shape}, found {found.dtype} of shape {tuple(found.shape)}. "
                    "The file is damaged, or belongs to a pool or base of another size."
                )
