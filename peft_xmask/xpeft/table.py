"""The mask table: every mask of a model, in one place at its root.

Trained state is ``xpeft_logits.<name>.weight [P, 2*S*N]`` and ``xpeft_gain.<name>.weight [P, S]``; shipped state is
``xpeft_bits.<name>.weight`` and ``xpeft_gain_bits.<name>.weight``: bytes, see
:class:`~peft_xmask.xpeft.spec.MaskSpec`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._peft import BaseTunerLayer, check_adapters_to_merge
from ..errors import ConfigError, MaskFormatError, PeftXMaskWarning
from ..functional import gain_weight, hard_mask, mask_weight, pick_rows, scaled_gain, select_top_k, soft_mask
from ..packing import pack_bits, pack_halves, unpack_bits, unpack_halves
from .spec import MaskSpec

REBUILT_LOGIT = 0.1
INIT_STD = 0.01


@dataclass(eq=False)
class Mixing:
    """Masks ready to mix with: R distinct rows, and which of them each example of the batch uses.

    Shapes: ``mask [R, 2, S, N]``, ``gain [R, S]``, ``index [B]`` or None when one row serves the whole batch.
    ``rows``, ``state`` and ``sources`` say what it was computed from, and so how long it holds.
    """

    mask: Tensor
    gain: Tensor
    index: Tensor | None
    rows: int | Tensor = 0
    state: tuple[Any, ...] = ()
    sources: list[tuple[nn.Module, Tensor, int | None, torch.dtype, torch.device]] = field(default_factory=list)

    def spread(self, mixed: Tensor) -> Tensor:
        """From one tensor per distinct row to one per example, or to the only one. ``[R, ...] -> [B, ...]``."""
        return mixed[0] if self.index is None else mixed[self.index.to(mixed.device)]


class XPEFTModule(BaseTunerLayer):
    """What PEFT visits when it sets, enables or deletes an X-PEFT adapter: the sites and the table."""


class Trained(nn.Module):
    """A trainable tensor, as a module with a ``.weight`` (which trl and FSDP look for)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class Shipped(nn.Module):
    """Bytes, as a module with a ``.weight`` buffer."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)


class MaskTable(nn.Module, XPEFTModule):
    """Masks of all sites, profiles and adapters of one model.

    An adapter made for training has logits, and bytes that stay zero unless a file is loaded into them; an adapter made
    for inference has bytes only. Masks of all sites are computed together, once per forward pass.
    """

    xpeft_logits: MutableMapping[str, Trained]
    xpeft_gain: MutableMapping[str, Trained]
    xpeft_bits: MutableMapping[str, Shipped]
    xpeft_gain_bits: MutableMapping[str, Shipped]
    adapter_layer_names = ("xpeft_logits", "xpeft_gain", "xpeft_bits", "xpeft_gain_bits")
    in_features = out_features = None  # PEFT asks every tuner layer for them; the table wraps no module

    def __init__(self) -> None:
        super().__init__()
        for name in self.adapter_layer_names:
            self.add_module(name, nn.ModuleDict())
        self.specs: dict[str, MaskSpec] = {}
        self.temperature: dict[str, float] = {}
        self.logit_scale: dict[str, float] = {}
        self.gumbel_noise: dict[str, float] = {}
        self.rebuilt: set[str] = set()
        self._rows: dict[str, int | Tensor] = {}
        self._batch_rows: Tensor | None = None
        self._cache: dict[str, Mixing] = {}
        self._noise: dict[str, Tensor] = {}
        self._inbox: dict[str, tuple[Any, ...]] = {}
        self.hook: RemovableHandle | None = None
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    @property
    def weight(self) -> None:  # type: ignore[override]
        """None: the table wraps no module."""
        return None

    @property
    def bias(self) -> None:  # type: ignore[override]
        """None: the table wraps no module."""
        return None

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
        """Enter an adapter; its masks start at random (torch's generator)."""
        self.specs[adapter_name] = spec
        self.logit_scale[adapter_name] = logit_scale
        self.temperature[adapter_name] = temperature
        self.gumbel_noise[adapter_name] = noise
        logits = torch.randn(spec.num_profiles, math.prod(spec.logits_shape[1:])) * (INIT_STD / logit_scale)
        gain = torch.zeros(spec.num_profiles, spec.num_sites)
        bits, gain_bits = self.pack(adapter_name, logits, gain)
        if trainable:
            self.xpeft_logits[adapter_name] = Trained(logits)
            bits = torch.zeros_like(bits)
            if spec.learn_gain:
                self.xpeft_gain[adapter_name] = Trained(gain)
                gain_bits = torch.zeros_like(gain_bits)
        self.xpeft_bits[adapter_name] = Shipped(bits)
        if spec.learn_gain:
            self.xpeft_gain_bits[adapter_name] = Shipped(gain_bits)

    def cast(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Hold what an adapter trains in another dtype. Its bytes stay bytes."""
        for container in (self.xpeft_logits, self.xpeft_gain):
            if adapter_name in container:
                container[adapter_name].to(dtype)

    def is_trained(self, adapter_name: str) -> bool:
        """Whether the adapter has logits."""
        return adapter_name in self.xpeft_logits

    def set_rows(self, adapter_name: str, row: int) -> None:
        """Choose the profile that serves whole batches. O(1).

        Raises:
            ConfigError: no such row.
        """
        count = self.specs[adapter_name].num_profiles
        if not 0 <= row < count:
            raise ConfigError(f"Row {row} is not in adapter '{adapter_name}', which has {count} profiles (from 0).")
        self._rows[adapter_name] = row

    def new_forward(self) -> None:
        """A forward pass begins: masks that depend on chance are drawn anew."""
        if self.training:
            self._cache.clear()
            self._noise.clear()

    def set_batch_rows(self, rows: Tensor | None) -> None:
        """One row for each example of the next batches; None: back to :meth:`set_rows`. Stays until set again."""
        self._batch_rows = rows

    def mixing(self, adapter_name: str) -> Mixing:
        """The masks in force now, computed at most once per forward pass.

        Raises:
            ConfigError: an adapter of several profiles, and none was chosen.
            MaskFormatError: bytes that were loaded, or logits that were trained, are no masks.
        """
        rows = self._active_rows(adapter_name)
        cached = self._cache.get(adapter_name)
        if cached is not None and self._holds(cached, adapter_name, rows):
            return cached
        self._take_in(adapter_name)
        holders = [
            container[adapter_name]
            for container in (self.xpeft_logits, self.xpeft_gain, self.xpeft_bits, self.xpeft_gain_bits)
            if adapter_name in container
        ]
        mixing = self._mixing(adapter_name, rows)
        mixing.rows, mixing.state = rows, self._state(adapter_name, [holder.weight for holder in holders])
        mixing.sources = [(holder, holder.weight, *_form(holder.weight)) for holder in holders]
        self._cache[adapter_name] = mixing
        return mixing

    def _holds(self, cached: Mixing, name: str, rows: int | Tensor) -> bool:
        """Whether a mixing is still true: asked at every site of every forward pass, so it looks nothing up."""
        by_row = isinstance(rows, int) and isinstance(cached.rows, int)
        if cached.rows is not rows and not (by_row and cached.rows == rows):
            return False
        for holder, weight, version, dtype, device in cached.sources:
            if holder.weight is not weight or (version, dtype, device) != _form(weight):
                return False
        return cached.state == self._state(name, [weight for _, weight, *_ in cached.sources])

    def _state(self, name: str, weights: list[Tensor]) -> tuple[Any, ...]:
        graph = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
        return self.training, graph, self.temperature[name], self.logit_scale[name]

    def _mixing(self, name: str, rows: int | Tensor) -> Mixing:
        index = None
        if isinstance(rows, Tensor):
            rows, index = torch.unique(rows, return_inverse=True)
        mask, gain = self._from_logits(name, rows) if self.is_trained(name) else self._from_bits(name, rows)
        return Mixing(mask, gain, index)

    def _from_logits(self, name: str, rows: int | Tensor) -> tuple[Tensor, Tensor]:
        spec, scale = self.specs[name], self.logit_scale[name]
        logits = pick_rows(self.xpeft_logits[name].weight, rows).float().unflatten(1, spec.logits_shape[1:])
        if self.training:
            logits = logits + self._draw_noise(name, logits) / scale if self.gumbel_noise[name] > 0 else logits
        elif not logits.isfinite().all():
            raise MaskFormatError(_not_finite(name))
        temperature = self.temperature[name] / scale
        if spec.mask_type == "hard":
            mask = hard_mask(logits, spec.top_k, estimator=spec.estimator, norm=spec.norm, temperature=temperature)
        else:
            mask = soft_mask(logits, norm=spec.norm, temperature=temperature)
        if not spec.learn_gain:
            return mask, self._constant_gain(name, mask)
        return mask, scaled_gain(pick_rows(self.xpeft_gain[name].weight, rows).float(), spec.scale, scale)

    def _from_bits(self, name: str, rows: int | Tensor) -> tuple[Tensor, Tensor]:
        spec = self.specs[name]
        bits = pick_rows(self.xpeft_bits[name].weight, rows)
        gain_bits = pick_rows(self.xpeft_gain_bits[name].weight, rows) if spec.learn_gain else None
        spec.check(bits, gain_bits)
        if spec.mask_type == "hard":
            mask = unpack_bits(bits, spec.num_adapters).float() * mask_weight(spec.top_k, spec.norm)
        else:
            mask = soft_mask(unpack_halves(bits), norm=spec.norm)
        return mask, self._constant_gain(name, mask) if gain_bits is None else unpack_halves(gain_bits)[..., 0]

    def _constant_gain(self, name: str, mask: Tensor) -> Tensor:
        return torch.full((mask.shape[0], self.specs[name].num_sites), self.specs[name].scale, device=mask.device)

    def _draw_noise(self, name: str, logits: Tensor) -> Tensor:
        """Drawn once per forward pass: a checkpointed block that is run again in backward must see the same masks."""
        noise = self._noise.get(name)
        if noise is None or noise.shape != logits.shape:
            noise = self._noise[name] = -torch.empty_like(logits).exponential_().log()
        return noise * self.gumbel_noise[name]

    def _active_rows(self, name: str) -> int | Tensor:
        if self._batch_rows is not None:
            return self._batch_rows
        row = self._rows.get(name, 0 if self.specs[name].num_profiles == 1 else None)
        if row is None:
            raise ConfigError(
                f"Adapter '{name}' holds {self.specs[name].num_profiles} profiles and none was chosen. Call "
                "model.set_profile(row), or pass adapter_names, a LongTensor with one row for each example."
            )
        return row

    def pack(self, adapter_name: str, logits: Tensor, gain: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is shipped for trained values: exactly what evaluation uses.

        Shapes: ``logits [P, 2*S*N]``, ``gain [P, S]``; returns ``bits`` and ``gain_bits`` as in :class:`MaskSpec`.

        Raises:
            MaskFormatError: a value is not finite.
        """
        spec = self.specs[adapter_name]
        scale = self.logit_scale[adapter_name]
        logits = logits.detach().float().view(-1, *spec.logits_shape[1:])
        if not logits.is_meta and not (logits.isfinite().all() and (gain is None or gain.isfinite().all())):
            raise MaskFormatError(_not_finite(adapter_name))
        if spec.mask_type == "hard":
            bits = pack_bits(select_top_k(logits, spec.top_k))
        else:
            bits = pack_halves(logits / (self.temperature[adapter_name] / scale))
        if gain is None:
            gain = torch.zeros(logits.shape[0], spec.num_sites)
        return bits, pack_halves(scaled_gain(gain.detach().float(), spec.scale, scale).unsqueeze(-1))

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

    def _take_in(self, name: str) -> None:
        """Bytes loaded into an adapter that trains (transformers' ``load_adapter`` does so) become its logits."""
        if not self.is_trained(name):
            return
        inbox = self.xpeft_bits[name].weight
        seen, version = self._inbox.get(name, (None, None))
        if seen is not inbox or version != _form(inbox)[0]:
            if inbox.any():
                gain_bits = self.xpeft_gain_bits[name].weight if self.specs[name].learn_gain else None
                self.specs[name].check(inbox, gain_bits)
                self.load(name, inbox, gain_bits)
                inbox.zero_()
            self._inbox[name] = (inbox, _form(inbox)[0])
        if self.training and name in self.rebuilt:
            self.rebuilt.discard(name)
            warnings.warn(
                f"Adapter '{name}' was loaded from bits, which say which adapters are chosen but not how nearly others "
                "were: its training state is not in the file. Logits were rebuilt that choose the same adapters. To "
                "resume exactly, train with XPEFTCallback, which keeps the logits beside each checkpoint.",
                PeftXMaskWarning,
                stacklevel=2,
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Note which adapters the sites have merged."""
        self.merged_adapters.extend(check_adapters_to_merge(self, adapter_names))

    def unmerge(self) -> None:
        """Note that the sites have unmerged."""
        self.merged_adapters.clear()

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter."""
        super().delete_adapter(adapter_name)
        notes: list[dict[str, Any]] = [self.specs, self.temperature, self.logit_scale, self.gumbel_noise]
        for note in (*notes, self._rows, self._cache, self._noise, self._inbox):
            note.pop(adapter_name, None)  # type: ignore[arg-type, attr-defined]
        self.rebuilt.discard(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Nothing to follow: the table wraps no module, and sites move masks to where their pool is."""

    def __getstate__(self) -> dict[str, Any]:
        """Without what a copy computes anew."""
        return {**self.__dict__, "_cache": {}, "_noise": {}, "_inbox": {}, "_batch_rows": None}


def begin_forward(root: nn.Module, *_: Any) -> None:
    """Forward pre-hook of the base model's root."""
    root.mask_table.new_forward()  # type: ignore[operator, union-attr]


def _form(tensor: Tensor) -> tuple[int | None, torch.dtype, torch.device]:
    """Version (None in inference mode, where nothing is counted), dtype and device."""
    return None if tensor.is_inference() else tensor._version, tensor.dtype, tensor.device


def _not_finite(name: str) -> str:
    return (
        f"Expected finite logits and gains in adapter '{name}', found NaN or infinity. Training diverged: lower the "
        "learning rate of the masks, or go back to an earlier checkpoint."
    )
