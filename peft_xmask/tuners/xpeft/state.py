"""What a mask table holds: logits and gains while training, bytes for shipping, and the way from either to masks.

Trained state is ``xpeft_logits.<name>.weight [P, 2*S*N]`` and ``xpeft_gain.<name>.weight [P, S]``; shipped state is
``xpeft_bits.<name>.weight`` and ``xpeft_gain_bits.<name>.weight``: bytes, see
:class:`~peft_xmask.tuners.xpeft.spec.MaskSpec`.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core.masks import gain_weight, pick_rows, require, scaled_gain, select_top_k
from ...core.packing import pack_bits, pack_halves, unpack_bits, unpack_halves
from ...errors import MaskFormatError
from ..base.peft_private import BaseTunerLayer
from ..base.state import PackedTensor, RootTable, TrainableTensor, gathered, lazy_zeros
from .mixing import Masks, masks_from_bits, masks_from_logits
from .spec import MaskSpec

REBUILT_LOGIT = 0.1
INIT_STD = 0.01
_BLOCK = 1024  # profiles that are packed at once


class XPEFTModule(BaseTunerLayer):
    """What PEFT visits when it sets, enables or deletes an X-PEFT adapter: the sites and the table."""


class MaskState(RootTable, XPEFTModule):
    """Masks of all sites, profiles and adapters of one model, as they are trained and as they are shipped.

    An adapter made for training has logits, and bytes that stay zero unless a file is loaded into them; an adapter made
    for inference has bytes only.
    """

    xpeft_logits: MutableMapping[str, TrainableTensor]
    xpeft_gain: MutableMapping[str, TrainableTensor]
    xpeft_bits: MutableMapping[str, PackedTensor]
    xpeft_gain_bits: MutableMapping[str, PackedTensor]
    adapter_layer_names = ("xpeft_logits", "xpeft_gain", "xpeft_bits", "xpeft_gain_bits")

    def __init__(self) -> None:
        super().__init__()
        for name in self.adapter_layer_names:
            self.add_module(name, nn.ModuleDict())
        self.specs: dict[str, MaskSpec] = {}
        self.temperature: dict[str, float] = {}
        self.logit_scale: dict[str, float] = {}
        self.gumbel_noise: dict[str, float] = {}
        self.rebuilt: set[str] = set()
        self._noise: dict[str, Tensor] = {}
        self._exploring = False

    def add(
        self,
        adapter_name: str,
        spec: MaskSpec,
        *,
        trainable: bool,
        logit_scale: float,
        temperature: float,
        noise: float,
    ) -> None:
        """Enter an adapter. The masks of one profile start at random (torch's generator).

        Of several that are trained, all start from the first ``top_k`` adapters (logits of zero): no start is better
        than another, and a head that they share sees one model at first.
        """
        self.specs[adapter_name] = spec
        self.logit_scale[adapter_name] = logit_scale
        self.temperature[adapter_name] = temperature
        self.gumbel_noise[adapter_name] = noise
        if trainable:
            self._add_trained(adapter_name, spec)
            return
        logits = torch.randn(1, math.prod(spec.logits_shape[1:])) * (INIT_STD / logit_scale)
        bits, gain_bits = self.pack(adapter_name, logits, torch.zeros(1, spec.num_sites))
        self.xpeft_bits[adapter_name] = PackedTensor(bits.repeat(spec.num_profiles, 1, 1, 1))
        if spec.learn_gain:
            self.xpeft_gain_bits[adapter_name] = PackedTensor(gain_bits.repeat(spec.num_profiles, 1, 1))

    def _add_trained(self, adapter_name: str, spec: MaskSpec) -> None:
        """Memory is taken row by row, as profiles are trained; bytes stay zero until a file is loaded into them."""
        rows, width = spec.num_profiles, math.prod(spec.logits_shape[1:])
        if rows == 1:
            logits = torch.randn(1, width) * (INIT_STD / self.logit_scale[adapter_name])
        else:
            logits = lazy_zeros(rows, width)
        self.xpeft_logits[adapter_name] = TrainableTensor(logits)
        self.xpeft_bits[adapter_name] = PackedTensor(lazy_zeros(*spec.bits_shape, dtype=torch.uint8))
        if spec.learn_gain:
            self.xpeft_gain[adapter_name] = TrainableTensor(lazy_zeros(rows, spec.num_sites))
            self.xpeft_gain_bits[adapter_name] = PackedTensor(lazy_zeros(*spec.gain_shape, dtype=torch.uint8))

    def cast(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Hold what an adapter trains in another dtype. Its bytes stay bytes."""
        for container in (self.xpeft_logits, self.xpeft_gain):
            if adapter_name in container:
                container[adapter_name].to(dtype)

    def is_trained(self, adapter_name: str) -> bool:
        """Whether the adapter has logits."""
        return adapter_name in self.xpeft_logits

    def pack(self, adapter_name: str, logits: Tensor, gain: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is shipped for trained values: exactly what evaluation uses.

        Shapes: ``logits [P, 2*S*N]``, ``gain [P, S]``; returns ``bits`` and ``gain_bits`` as in :class:`MaskSpec`.

        Raises:
            MaskFormatError: a value is not finite, or a gain is too large for half precision.
        """
        logits = gathered(logits.detach())
        gain = None if gain is None else gathered(gain.detach())
        if len(logits) > _BLOCK:
            gains = [None] * -(-len(logits) // _BLOCK) if gain is None else gain.split(_BLOCK)
            parts = [self.pack(adapter_name, *part) for part in zip(logits.split(_BLOCK), gains, strict=True)]
            return torch.cat([bits for bits, _ in parts]), torch.cat([gain_bits for _, gain_bits in parts])
        spec, scale = self.specs[adapter_name], self.logit_scale[adapter_name]
        logits = logits.float().view(-1, *spec.logits_shape[1:])
        if not logits.is_meta and not (logits.isfinite().all() and (gain is None or gain.isfinite().all())):
            raise MaskFormatError(not_finite(adapter_name))
        if spec.mask_type == "hard":
            bits = pack_bits(select_top_k(logits, spec.top_k))
        else:
            bits = pack_halves(logits / (self.temperature[adapter_name] / scale))
        if gain is None:
            gain = torch.zeros(logits.shape[0], spec.num_sites)
        gains = scaled_gain(gain.float(), spec.scale, scale)
        if not gains.is_meta and not gains.isfinite().all():
            raise MaskFormatError(
                f"Expected gains of at most 65504 in adapter '{adapter_name}', which half precision can hold, found "
                "larger ones. Training diverged: lower the learning rate of the masks, or config.scale."
            )
        return bits, pack_halves(gains.unsqueeze(-1))

    def unpack(self, adapter_name: str, bits: Tensor, gain_bits: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Values to train on from shipped ones; they :meth:`pack` to the same bytes. Inverse shapes of :meth:`pack`."""
        spec, scale = self.specs[adapter_name], self.logit_scale[adapter_name]
        if spec.mask_type == "hard":
            logits = (unpack_bits(bits, spec.num_adapters).float() * 2 - 1) * (REBUILT_LOGIT / scale)
        else:
            logits = unpack_halves(bits) * (self.temperature[adapter_name] / scale)
        gain = None if gain_bits is None else gain_weight(unpack_halves(gain_bits)[..., 0], spec.scale, scale)
        return logits.flatten(1), gain

    def rescale_logits(self, adapter_name: str, logit_scale: float) -> None:
        """Train on another scale from here on, with the same masks and gains."""
        if logit_scale == self.logit_scale[adapter_name]:
            return
        ratio = self.logit_scale[adapter_name] / logit_scale
        with torch.no_grad():
            self.xpeft_logits[adapter_name].weight.mul_(ratio)
            if adapter_name in self.xpeft_gain:
                self.xpeft_gain[adapter_name].weight.mul_(ratio)
        self.logit_scale[adapter_name] = logit_scale

    def load(self, adapter_name: str, bits: Tensor, gain_bits: Tensor | None) -> None:
        """Give a trained adapter the masks and gains of checked bytes."""
        logits, gain = self.unpack(adapter_name, bits, gain_bits)
        with torch.no_grad():
            self.xpeft_logits[adapter_name].weight.copy_(logits)
            if gain is not None:
                self.xpeft_gain[adapter_name].weight.copy_(gain)
        self.rebuilt.add(adapter_name)

    def copy_bytes(self, source: str, adapter_name: str) -> None:
        """Give an adapter the masks and gains of another one, where neither is trained."""
        if self.is_trained(source) or self.is_trained(adapter_name):
            return
        for container in (self.xpeft_bits, self.xpeft_gain_bits):
            if adapter_name in container:
                container[adapter_name].weight.copy_(container[source].weight)

    def masks(self, adapter_name: str, rows: int | Tensor | None) -> Masks:
        """Masks of rows as they are now.

        Args:
            rows: long ``[R]``, of which -1 is none and has gains of zero; or one row; or None: all of them.

        Raises:
            MaskFormatError: bytes that were loaded, or logits that were trained, are no masks.
        """
        from_either = self._from_logits if self.is_trained(adapter_name) else self._from_bits
        masks = from_either(adapter_name, rows)
        if isinstance(rows, Tensor):
            return Masks(masks.mask, masks.gain * (rows >= 0).to(masks.gain.device).unsqueeze(1))
        return masks

    def _from_logits(self, name: str, rows: int | Tensor | None) -> Masks:
        logits = pick_rows(self.xpeft_logits[name].weight, rows).float().unflatten(1, self.specs[name].logits_shape[1:])
        gain = pick_rows(self.xpeft_gain[name].weight, rows).float() if name in self.xpeft_gain else None
        if self._is_noisy(name):
            logits = logits + self._draw_noise(name, logits) / self.logit_scale[name]
        elif not self.training:
            require(logits.isfinite().all(), MaskFormatError(not_finite(name)))
        return masks_from_logits(
            self.specs[name],
            logits,
            gain,
            temperature=self.temperature[name],
            logit_scale=self.logit_scale[name],
        )

    def _from_bits(self, name: str, rows: int | Tensor | None) -> Masks:
        bits = pick_rows(self.xpeft_bits[name].weight, rows)
        gain_bits = pick_rows(self.xpeft_gain_bits[name].weight, rows) if name in self.xpeft_gain_bits else None
        if torch.compiler.is_compiling():
            self.specs[name].check_in_graph(bits, gain_bits)
        else:
            self.specs[name].check(bits, gain_bits)
        return masks_from_bits(self.specs[name], bits, gain_bits)

    def _is_noisy(self, name: str) -> bool:
        """Noise is for learning: a pass without gradients, as that of trl's reference model, sees the masks themselves.

        The noise of the last pass that learns is kept through it: blocks may yet be run again in backward.
        """
        learns = torch.is_grad_enabled() or (self._exploring and not torch.compiler.is_compiling())
        return learns and self.training and self.gumbel_noise[name] > 0

    def _draw_noise(self, name: str, logits: Tensor) -> Tensor:
        """Drawn once per forward pass: a checkpointed block that is run again in backward must see the same masks."""
        if torch.compiler.is_compiling():
            return -torch.empty_like(logits).exponential_().log() * self.gumbel_noise[name]
        noise = self._noise.get(name)
        if noise is None or noise.shape != logits.shape:
            noise = self._noise[name] = -torch.empty_like(logits).exponential_().log()
        return noise * self.gumbel_noise[name]

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter."""
        super().delete_adapter(adapter_name)
        notes: list[dict[str, Any]] = [
            self.specs, self.temperature, self.logit_scale, self.gumbel_noise, self._noise,
        ]  # fmt: skip
        for note in notes:
            note.pop(adapter_name, None)
        self.rebuilt.discard(adapter_name)


def not_finite(name: str) -> str:
    """What to say of an adapter whose training diverged."""
    return (
        f"Expected finite logits and gains in adapter '{name}', found NaN or infinity. Training diverged: lower the "
        "learning rate of the masks, or go back to an earlier checkpoint."
    )
