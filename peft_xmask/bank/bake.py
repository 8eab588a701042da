"""Profiles as standard LoRAs, computed without a model from a bank's bytes, the pool and the base's config."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig
from torch import Tensor

from ..core.adapter import AdapterPair
from ..core.adapter_folder import ADAPTER_FILE
from ..core.files import write_tensors
from ..core.fingerprint import fingerprint_weights
from ..core.hub import HubOptions
from ..core.lora import LinearChange, lora_tensors, parallel_change, sequential_change
from ..core.sites import Site
from ..errors import BaseMismatchError, ConfigError, MergeError, PoolMismatchError
from ..pool import AdapterPool, PoolSlice
from ..tuners.xpeft import XPEFTConfig
from ..tuners.xpeft.mixing import masks_from_bits
from .base import AdaptedModule, BaseFolder
from .profile import Profile

if TYPE_CHECKING:
    from .rows import BankRows


@dataclass(frozen=True)
class BakedLora:
    """A LoRA that plain PEFT, vLLM and diffusers read.

    Attributes:
        tensors: by their key in an adapter's file, float32: ``lora_A [r, in_features]``, ``lora_B [out_features, r]``.
        config: config of the LoRA; its scale is 1.
    """

    tensors: Mapping[str, Tensor]
    config: LoraConfig

    @classmethod
    def of(
        cls,
        changes: Mapping[str, LinearChange],
        like: object,
        *,
        rank: int | None = None,
        fan_in_fan_out: bool = False,
        shared: Mapping[str, Tensor] | None = None,
    ) -> BakedLora:
        """Write linear changes as a LoRA.

        Args:
            changes: by module name.
            like: the config of the adapter they come from: task, base and modules saved whole are taken from it.
            rank: rank of the LoRA, at least that of the changes; None: the rank of the changes.
            fan_in_fan_out: whether the base's modules are ``Conv1D``.
            shared: tensors of modules saved whole, by their key in an adapter's file.

        Raises:
            ConfigError: ``rank`` is smaller than the rank of the changes.
        """
        tensors = lora_tensors(changes, rank)
        size = rank or next(iter(changes.values())).down.shape[0]
        config = LoraConfig(
            r=size,
            lora_alpha=size,
            lora_bias=any(key.endswith("lora_B.bias") for key in tensors),
            target_modules=list(changes),
            modules_to_save=getattr(like, "modules_to_save", None),
            task_type=getattr(like, "task_type", None),
            base_model_name_or_path=getattr(like, "base_model_name_or_path", None),
            fan_in_fan_out=fan_in_fan_out,
            inference_mode=True,
        )
        return cls({**tensors, **{key: tensor.cpu() for key, tensor in (shared or {}).items()}}, config)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``adapter_model.safetensors`` and ``adapter_config.json``."""
        write_tensors(Path(folder) / ADAPTER_FILE, self.tensors)
        self.config.save_pretrained(os.fspath(folder))


@dataclass
class _PlacedSlice:
    """A site, for mixing: its slice of the pool and its index among the masks."""

    pool: PoolSlice
    index: int


class LoraBaker:
    """Turns profiles of one bank into LoRAs. It holds the pool, and of a sequential bank the adapted modules' weights.

    Args:
        bank: whose profiles are baked; only its settings are kept, so profiles added later can be baked too.
        base: folder or Hub id of the base; None: the base that the bank names.
        check_base: whether the base's weights are read to check the fingerprint. A sequential bank needs them anyway.
        hub: how to reach the Hub.

    Raises:
        ConfigError: there is no such base, or it has another task.
        MergeError: the profiles are not linear.
        BaseMismatchError, PoolMismatchError: the profiles were trained on another base or pool.
        TargetError, FileFormatError: the base lacks modules or weights.
    """

    def __init__(
        self,
        bank: BankRows,
        base: str | os.PathLike[str] | None = None,
        *,
        check_base: bool = True,
        hub: HubOptions | None = None,
    ) -> None:
        self.config: XPEFTConfig = copy.copy(bank.config)
        self.shared = bank.shared
        refuse_nonlinear(bank)
        sequential = self.config.insertion_form == "sequential"
        where = base if base is not None else self.config.base_model_name_or_path
        if where is None:
            raise ConfigError("The bank does not name its base. Pass base=, the folder or Hub id of the base model.")
        pool = _pool_of(self.config)
        folder = BaseFolder.find(where, hub or HubOptions(), weights=check_base or sequential)
        self.modules = folder.adapted_modules(self.config)
        self.spec = self.config.mask_spec(len(self.modules))
        if self.spec.num_sites != bank.spec.num_sites:
            raise BaseMismatchError(
                f"Expected a base with {bank.spec.num_sites} adapted modules, as the masks have, found "
                f"{self.spec.num_sites} in '{folder.path}'. Pass the base that the profiles were trained on.",
                expected=bank.spec.num_sites,
                found=self.spec.num_sites,
            )
        weights = folder.weights([each.name for each in self.modules]) if check_base or sequential else None
        if check_base and weights is not None:
            _check_base(self.config, folder, [weight for weight, _ in weights.values()])
        if sequential and weights is None:
            raise MergeError(
                f"The base in '{folder.path}' is quantised, and a sequential profile as a LoRA needs its weights. Name "
                'the folder of the base before quantisation, or train with insertion_form="parallel".'
            )
        self._weights = weights if sequential else None
        sites = [_site(each, sequential) for each in self.modules]
        self._rank = pool.mixed_size
        self._slices = [_PlacedSlice(part, index) for index, part in enumerate(pool.bind(sites))]

    @property
    def rank(self) -> int:
        """Rank of the LoRAs: the pool's bottleneck size, and that of a common adapter beside the mix."""
        return self._rank

    @property
    def has_bias(self) -> bool:
        """Whether the LoRAs have biases: those of the pool, or, of a sequential bank, of the base's modules."""
        base = self._weights is not None and any(bias is not None for _, bias in self._weights.values())
        parts = [part for each in self._slices for part in (each.pool, each.pool.common) if part is not None]
        return base or any(tensor is not None for part in parts for tensor in (part.down_bias, part.up_bias))

    def bake(self, profile: Profile, rank: int | None = None) -> BakedLora:
        """A profile as a LoRA: that of :func:`~peft_xmask.export_lora`, bit for bit.

        Args:
            profile: of the bank, or of another one with the same settings.
            rank: rank of the LoRA; None: :attr:`rank`. A larger rank is padded with zeros, which changes no output.

        Raises:
            MaskFormatError: the masks are of another kind.
            ConfigError: ``rank`` is smaller than :attr:`rank`.
        """
        return BakedLora.of(
            self.changes(profile),
            self.config,
            rank=rank,
            fan_in_fan_out=self.modules[0].fan_in_fan_out,
            shared=self.shared,
        )

    @torch.no_grad()
    def changes(self, profile: Profile) -> dict[str, LinearChange]:
        """The change that a profile makes to each module's output, by module name.

        Raises:
            MaskFormatError: the masks are of another kind.
        """
        bits = profile.bits.unsqueeze(0)
        gain_bits = None if profile.gain_bits is None else profile.gain_bits.unsqueeze(0)
        self.spec.check(bits, gain_bits)
        masks = masks_from_bits(self.spec, bits, gain_bits)
        return {
            module.name: self._change(module, _first(masks.at(part)))
            for module, part in zip(self.modules, self._slices, strict=True)
        }

    def _change(self, module: AdaptedModule, pair: AdapterPair) -> LinearChange:
        if self._weights is None:
            return parallel_change(pair)
        weight, bias = self._weights[module.name]
        return sequential_change(pair, weight.T if module.fan_in_fan_out else weight, bias)


def refuse_nonlinear(bank: BankRows) -> None:
    """Refuse profiles that have no form as a LoRA.

    Raises:
        MergeError: the profiles have an activation, a LayerNorm, or offsets of the model's outputs.
    """
    config = bank.config
    if bank.offset_count is not None:
        raise MergeError(
            f"These profiles have offsets of {bank.offset_count} outputs, which are added to what the model says and "
            "have no place in a LoRA. Serve them with ProfileBank.attach."
        )
    if not config.form.linear:
        raise MergeError(
            f"These profiles have activation={config.activation!r}, layer_norm={config.layer_norm}: only "
            'activation="identity" without layer_norm is a linear map, which a LoRA can say. Serve them with '
            "ProfileBank.attach."
        )


def _pool_of(config: XPEFTConfig) -> AdapterPool:
    expected = config.pool_fingerprint
    pool = config.resolve_pool()
    if expected is not None and pool.fingerprint != expected:
        raise PoolMismatchError(
            f"These profiles were trained on the pool with fingerprint {expected}; the pool at hand ({pool!r}) has "
            f"{pool.fingerprint}. Their config names the pool {config.pool!r}: put that one there.",
            expected=expected,
            found=pool.fingerprint,
        )
    return pool


def _check_base(config: XPEFTConfig, folder: BaseFolder, weights: Sequence[Tensor]) -> None:
    expected, found = config.base_fingerprint, fingerprint_weights(weights)
    if expected is not None and found is not None and expected != found:
        raise BaseMismatchError(
            f"These profiles were made for a base whose adapted weights have fingerprint {expected}; the base in "
            f"'{folder.path}' has {found}. Pass the base they were trained on (base_model_name_or_path: "
            f"{config.base_model_name_or_path!r}), or check_base=False to use another one on purpose.",
            expected=expected,
            found=found,
        )


def _site(module: AdaptedModule, sequential: bool) -> Site:
    width = module.out_features if sequential else module.in_features
    return Site(module.name, width, module.out_features)


def _first(rows: AdapterPair) -> AdapterPair:
    """The only one of the rows."""
    return AdapterPair(
        down=rows.down[0],
        up=rows.up[0],
        down_bias=None if rows.down_bias is None else rows.down_bias[0],
        up_bias=None if rows.up_bias is None else rows.up_bias[0],
    )
