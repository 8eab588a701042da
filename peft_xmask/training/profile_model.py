"""A base model with one trainable row of masks for each profile."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

from ..bank.bank import ProfileBank
from ..bank.names import NameIndex
from ..bank.storage import BITS, GAIN_BITS
from ..core.fingerprint import digest_of
from ..errors import ConfigError
from ..tuners.xpeft import XPEFTConfig
from ..tuners.xpeft.masks import AdapterMasks
from ..tuners.xpeft.offset import set_offsets
from ..tuners.xpeft.table import find_table

Packed = tuple[Tensor, "Tensor | None"]
"""Masks and gains as they are shipped: uint8 ``[U, 2, S, W]`` and, where gains are learnt, ``[U, S, 2]``."""


@dataclass(frozen=True)
class ProfileModel:
    """A base model with one trainable row of masks for each profile.

    Attributes:
        model: row i of its adapter belongs to ``index.name(i)``.
        adapter: name of that adapter.
        index: names of the rows.
    """

    model: PeftModel
    adapter: str
    index: NameIndex

    @classmethod
    def of(
        cls,
        model: nn.Module,
        config: XPEFTConfig | None,
        bank: ProfileBank | None,
        index: NameIndex,
        logit_scale: float,
    ) -> ProfileModel:
        """Adapt a base, or take a model that is adapted already.

        Args:
            model: a base; or a PeftModel whose active adapter has a row for each name.
            config: of the adapter; None: that of the bank, or the default.
            bank: gives its head, and its masks to the profiles that it has; the others start like new ones.
            index: names of the rows.
            logit_scale: see :class:`~peft_xmask.XPEFTConfig`.

        Raises:
            ConfigError: a PeftModel without such rows.
            BaseMismatchError, PoolMismatchError: the bank belongs to another base or pool.
        """
        if isinstance(model, PeftModel):
            return cls._adapted(model, config, bank, index, logit_scale)
        if config is None:
            config = XPEFTConfig(task_type="SEQ_CLS") if bank is None else bank.config
        config = copy.copy(config)
        config.num_profiles, config.inference_mode, config.logit_scale = len(index), False, logit_scale
        found = cls(get_peft_model(model, config), "default", index)
        if bank is not None:
            found._start_from(bank)
        return found

    @classmethod
    def _adapted(
        cls,
        model: PeftModel,
        config: XPEFTConfig | None,
        bank: ProfileBank | None,
        index: NameIndex,
        logit_scale: float,
    ) -> ProfileModel:
        name = model.active_adapter
        masks = find_table(model).adapters.get(name)
        if bank is not None or config is not None:
            raise ConfigError("Expected the base model with config= or bank=, found a PeftModel.")
        if masks is None or not masks.is_trained or masks.spec.num_profiles != len(index):
            raise ConfigError(
                f"Expected an active X-PEFT adapter that is trained and has num_profiles={len(index)}, as many as the "
                f"dataset has profiles; found '{name}'. Pass the base model and config= instead."
            )
        masks.rescale_logits(logit_scale)
        model.peft_config[name].logit_scale = logit_scale  # type: ignore[attr-defined]
        return cls(model, name, index)

    def _start_from(self, bank: ProfileBank) -> None:
        bits, gain_bits = self.masks.shipped()
        known = {row: bank[name] for row, name in enumerate(self.index) if name in bank}
        for row, profile in known.items():
            bits[row] = profile.bits
            if gain_bits is not None and profile.gain_bits is not None:
                gain_bits[row] = profile.gain_bits
        state = {**bank.shared, BITS: bits, **({} if gain_bits is None else {GAIN_BITS: gain_bits})}
        set_peft_model_state_dict(self.model, state, adapter_name=self.adapter)
        self.masks.rebuilt = False
        new = torch.tensor([row not in known for row in range(len(self.index))])
        with torch.no_grad():
            for weight in self.weights().values():
                weight[new] = 0

    @property
    def config(self) -> Any:
        """The adapter's config."""
        return self.model.peft_config[self.adapter]

    @property
    def masks(self) -> AdapterMasks:
        """The adapter's masks."""
        return find_table(self.model).adapters[self.adapter]

    @property
    def causal(self) -> bool:
        """Whether each token predicts the next one."""
        return getattr(self.config, "task_type", None) == "CAUSAL_LM"

    def weights(self) -> dict[str, nn.Parameter]:
        """What is trained of each profile: logits ``[U, 2 * S * N]`` and, where gains are learnt, gains ``[U, S]``."""
        return self.masks.trained_state()

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`weights` gave earlier."""
        with torch.no_grad():
            for name, weight in self.weights().items():
                weight.copy_(tensors[name])
        self.masks.rebuilt = False

    def head(self) -> dict[str, nn.Parameter]:
        """The parameters that PEFT trains besides the masks."""
        found = dict(self.model.named_parameters())
        return {key: found[key] for key in found if f".modules_to_save.{self.adapter}." in key}

    def packed(self) -> Packed:
        """The current masks, as bytes."""
        bits, gain_bits = self.masks.shipped()
        return bits.cpu(), None if gain_bits is None else gain_bits.cpu()

    def load(self, packed: Packed) -> None:
        """Give every profile these masks and gains."""
        self.masks.load(*packed)

    def set_offsets(self, offset_bits: Tensor | None) -> None:
        """Let the model add these offsets, uint8 ``[U, 2 * C]``, to its outputs; None: no offsets.

        Raises:
            ConfigError: the model has no classification head.
        """
        set_offsets(self.model, find_table(self.model), self.adapter, offset_bits)

    def identity(self) -> str:
        """A digest of the adapter's config and of the pool and base that it is on."""
        facts = json.dumps(self.config.to_dict(), sort_keys=True, default=_plain)
        return digest_of([facts.encode()])


def _plain(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, (set, frozenset)) else str(value)
