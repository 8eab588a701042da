"""What is trained of an adapter's masks, and how it becomes masks and bytes: logits and gains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.masks import gain_weight, hard_mask, scaled_gain, select_top_k, soft_mask
from ...core.packing import pack_bits, pack_halves, unpack_bits, unpack_halves
from ...errors import MaskFormatError
from ..base.sharded import gathered
from .mixing import RowMasks, constant_gain
from .spec import MaskSpec

REBUILT_LOGIT = 0.1
"""Size of the logits that are rebuilt from the bits of a hard mask."""
START_SPREAD = 1.0
"""Size of the logits where profiles over a fitted pool start."""
_BLOCK = 1024  # profiles that are packed at once


@dataclass(frozen=True)
class LogitForm:
    """How trained numbers become the masks of an adapter, and bytes numbers to train on.

    With weights w ``[P, 2*S*N]`` and v ``[P, S]`` that are trained, the logits are ``logit_scale * w + start`` and the
    gains those of :func:`~peft_xmask.core.masks.scaled_gain`. Everything here works with logits over ``logit_scale``.

    Attributes:
        adapter: name of the adapter, for errors.
        spec: what its masks are.
        logit_scale: see above.
        temperature: of the softmax, or of the estimator's surrogate.
        fitted: whether the pool was fitted: hard masks then start at :func:`starting_logits`, not at 0.
    """

    adapter: str
    spec: MaskSpec
    logit_scale: float
    temperature: float
    fitted: bool = False

    @property
    def has_start(self) -> bool:
        """Whether logits start elsewhere than at 0."""
        return self.fitted and self.spec.mask_type == "hard"

    def logits(self, weight: Tensor) -> Tensor:
        """Logits over ``logit_scale``, float32. Shapes: ``[R, 2*S*N] -> [R, 2, S, N]``."""
        logits: Tensor = weight.float().unflatten(1, self.spec.logits_shape[1:])
        return logits + self._start(weight.device) if self.has_start else logits

    def masks(self, logits: Tensor, gain: Tensor | None) -> RowMasks:
        """Masks and gains, as training and evaluation use them.

        Args:
            logits: of :meth:`logits`, perhaps with noise.
            gain: what is trained of gains, ``[R, S]``; None: every gain is ``scale``.
        """
        spec, temperature = self.spec, self.temperature / self.logit_scale
        if spec.mask_type == "hard":
            mask = hard_mask(
                logits, spec.top_k, estimator=spec.estimator, weighting=spec.weighting, temperature=temperature
            )
        else:
            mask = soft_mask(logits, weighting=spec.weighting, temperature=temperature)
        if gain is None:
            return RowMasks(mask, constant_gain(spec, mask))
        return RowMasks(mask, scaled_gain(gain.float(), spec.scale, self.logit_scale))

    def pack(self, weight: Tensor, gain: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is shipped for trained numbers: exactly what evaluation uses.

        Args:
            weight: ``[P, 2*S*N]``.
            gain: ``[P, S]``; None: every gain is ``scale``.

        Returns:
            ``bits`` and ``gain_bits``, as in :class:`~peft_xmask.tuners.xpeft.spec.MaskSpec`.

        Raises:
            MaskFormatError: a number is not finite, or a gain is too large for half precision.
        """
        weight, gain = gathered(weight), None if gain is None else gathered(gain)
        if len(weight) > _BLOCK:
            gains = [None] * -(-len(weight) // _BLOCK) if gain is None else gain.split(_BLOCK)
            parts = [self.pack(*part) for part in zip(weight.split(_BLOCK), gains, strict=True)]
            return torch.cat([bits for bits, _ in parts]), torch.cat([gain_bits for _, gain_bits in parts])
        spec, logits = self.spec, self.logits(weight)
        if not logits.is_meta and not (logits.isfinite().all() and (gain is None or gain.isfinite().all())):
            raise self.not_finite()
        if spec.mask_type == "hard":
            bits = pack_bits(select_top_k(logits, spec.top_k))
        else:
            bits = pack_halves(logits / (self.temperature / self.logit_scale))
        if gain is None:
            gain = torch.zeros(logits.shape[0], spec.num_sites)
        gains = scaled_gain(gain.float(), spec.scale, self.logit_scale)
        if not gains.is_meta and not gains.isfinite().all():
            raise MaskFormatError(
                f"Expected gains of at most 65504 in adapter '{self.adapter}', which half precision can hold, found "
                "larger ones. Training diverged: lower the learning rate of the masks, or config.scale."
            )
        return bits, pack_halves(gains.unsqueeze(-1))

    def unpack(self, bits: Tensor, gain_bits: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Numbers to train on that :meth:`pack` to these bytes. Inverse shapes of :meth:`pack`."""
        spec, scale = self.spec, self.logit_scale
        if spec.mask_type == "hard":
            signs = unpack_bits(bits, spec.num_adapters).float() * 2 - 1
            weight = signs * (REBUILT_LOGIT / scale)
            weight = weight - self._start(bits.device) if self.has_start else weight
        else:
            weight = unpack_halves(bits) * (self.temperature / scale)
        gain = None if gain_bits is None else gain_weight(unpack_halves(gain_bits)[..., 0], spec.scale, scale)
        return weight.flatten(1), gain

    def not_finite(self) -> MaskFormatError:
        """The error of logits or gains that are not finite."""
        return MaskFormatError(
            f"Expected finite logits and gains in adapter '{self.adapter}', found NaN or infinity. Training diverged: "
            "lower the learning rate of the masks, or go back to an earlier checkpoint."
        )

    def _start(self, device: torch.device) -> Tensor:
        return starting_logits(self.spec, device) / self.logit_scale


def starting_logits(spec: MaskSpec, device: torch.device | None = None) -> Tensor:
    """Logits where hard masks over a fitted pool start: the first ``top_k`` adapters are chosen. Shape ``[N]``.

    They fall evenly from ``START_SPREAD`` to minus that, so that bits change one after another. At equal logits the
    first step of Adam, which moves each by the learning rate, would set all bits at once, by the sign of one gradient.
    """
    place = torch.arange(spec.num_adapters, dtype=torch.float32, device=device)
    return (spec.top_k - 0.5 - place) * (2 * START_SPREAD / spec.num_adapters)
