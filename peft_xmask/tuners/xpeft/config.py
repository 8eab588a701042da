"""Configuration of X-PEFT."""

from __future__ import annotations

import copy
import os
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...core.adapter import AdapterForm
from ...core.files import dtype_from_name
from ...core.hub import HubPath, shown_name
from ...core.masks import ESTIMATORS, MASK_WEIGHTINGS
from ...errors import ConfigError
from ...pool import BOTTLENECK_SIZE, NUM_ADAPTERS, AdapterPool
from ...pool.beside import located
from ..base.config import CardPool, require_choice, require_number, require_positive
from ..base.peft_private import peft_type
from ..sites.config import SiteConfig
from .spec import MaskSpec

XPEFT = peft_type("XPEFT")

MASK_TYPES = ("hard", "soft")
MAX_PROFILES = 2**31 - 1
"""Rows of one adapter: a bank numbers them with 32 bits."""
AVERAGE_SCALE = 2.0
"""Gain over a trained pool, where several adapters are averaged; 1.0 where one is chosen, which is then itself."""
FORMER_WEIGHTINGS = {"signs": "signed"}
FORMER_ESTIMATORS = {"identity": "straight_through"}
"""Values in files of earlier versions, by what they are called now."""
CENTRED_SCALE = 1.0
"""Gain of deviations from a common adapter.

Weights of +-1 / sqrt(N) make a mix of N deviations as large as one of them (a test measures it), so a profile can be as
far from the mean as the adapters of the pool are. A fitted pool's directions are scaled for this gain.
"""
RANDOM_SCALE = 0.3
STEERABLE = 40.0
"""Over a random pool the gain is ``STEERABLE / N`` if that is below ``RANDOM_SCALE``."""


@dataclass
class XPEFTConfig(SiteConfig):
    """Masks over a frozen pool of N adapters.

    At site s and for profile p, ``A = sum_i m_A[i] A_i, B = g * sum_i m_B[i] B_i, y <- y + B act(A y)``.
    Only the masks ``m_A``, ``m_B`` are trained, and with ``learn_gain`` one gain ``g`` per site.

    Args:
        pool: None for a random pool (made from the three fields below); a saved pool's folder or Hub id; or an
            :class:`~peft_xmask.AdapterPool`.
        num_adapters: N of a random pool; read from the pool otherwise.
        bottleneck_size: b of a random pool; read from the pool otherwise.
        pool_seed: seed of a random pool: the pool *is* its seed.
        pool_dtype: dtype of a random pool in memory: ``"float32"``, ``"bfloat16"`` or ``"float16"``. None:
            ``"bfloat16"`` if most of the base's weights are, otherwise ``"float32"``; recorded when the adapter is
            made, so that a saved adapter has the same pool on any base.
        mask_type: ``"hard"``: exactly ``top_k`` of N, one bit each; ``"soft"``: softmax weights, two bytes each.
        top_k: adapters in a hard mask; None: ``max(1, N // 2)``.
        scale: the gain g, or where it starts. None: ``min(0.3, 40 / N)`` for a random pool, whose output then starts at
            a few tenths of the module's own, and lower where many masks can steer it far; 2.0 for a trained pool, since
            an average is smaller than what it is of, and 1.0 if one adapter is chosen.
        num_profiles: P, rows of the mask table.
        learn_gain: whether g is trained: one half-precision number per site and profile. It forgives a scale that does
            not suit the base.
        mask_weighting: the weights of a mask. ``"variance"``: their 2-norm is 1, so a mix of independent adapters has
            the variance of one; ``"mean"``: their sum is 1; ``"signed"``: a hard mask adds the chosen adapters and
            subtracts the others, with a 2-norm of 1. None: what suits the pool, which is ``"mean"`` for trained
            adapters, and ``"signed"`` (``"variance"`` if masks are soft) for random and for centred ones.
        estimator: gradient of a hard mask: ``"straight_through"``, ``"softmax"`` or ``"sigmoid"``, see
            :func:`peft_xmask.core.masks.hard_mask`.
        temperature: of the softmax, or of the estimator's surrogate.
        gumbel_noise: standard Gumbel noise times this number is added to the logits in training; 0: none.
        logit_scale: logits are ``logit_scale * weight``. With Adam, a step of the learning rate on ``weight`` moves a
            logit by ``logit_scale`` times as much: masks want steps about 100 times those of a head.
            :class:`~peft_xmask.XPEFTCallback` sets it from a learning rate of its own.
        pool_fingerprint: of the pool; recorded when the adapter is made, checked when it is loaded.
        mask_norm: the former name of ``mask_weighting``, in files of earlier versions, where ``"signed"`` was
            ``"signs"`` and the estimator ``"straight_through"`` was ``"identity"``.

    The other fields are those of :class:`peft_xmask.tuners.sites.config.SiteConfig`. docs/study.md says under
    "Defaults" what decided each default.

    Raises:
        ConfigError: a field has an invalid value.

    Source: X-PEFT (arXiv 2401.16137); the gain, the weightings and logit_scale are ours.
    """

    pool: str | AdapterPool | None = field(default=None, metadata={"help": "None (random), folder, Hub id or pool."})
    num_adapters: int = field(default=NUM_ADAPTERS, metadata={"help": "N of a random pool."})
    bottleneck_size: int = field(default=BOTTLENECK_SIZE, metadata={"help": "Bottleneck of a random pool."})
    pool_seed: int = field(default=0, metadata={"help": "Seed of a random pool."})
    pool_dtype: str | None = field(
        default=None,
        metadata={"help": "What a random pool is held in; None: bfloat16 for a bfloat16 base."},
    )
    mask_type: str = field(default="hard", metadata={"help": "'hard' or 'soft'."})
    top_k: int | None = field(default=None, metadata={"help": "Adapters in a hard mask; None: half of them."})
    scale: float | None = field(default=None, metadata={"help": "The gain, or its start; None: by kind of pool."})
    num_profiles: int = field(default=1, metadata={"help": "Rows of the mask table."})
    learn_gain: bool = field(default=True, metadata={"help": "Train one gain per site."})
    mask_weighting: str | None = field(
        default=None, metadata={"help": "'variance', 'mean' or 'signed'; None: what suits the pool."}
    )
    estimator: str = field(default="straight_through", metadata={"help": "Gradient of a hard mask."})
    temperature: float = field(default=1.0, metadata={"help": "Of the softmax or the estimator's surrogate."})
    gumbel_noise: float = field(default=0.0, metadata={"help": "Size of Gumbel noise on the logits in training."})
    logit_scale: float = field(default=100.0, metadata={"help": "Logits are logit_scale times what is trained."})
    pool_fingerprint: str | None = field(default=None, metadata={"help": "Fingerprint of the pool."})
    mask_norm: InitVar[str | None] = None

    def __post_init__(self, mask_norm: str | None) -> None:
        super().__post_init__()
        self.peft_type = XPEFT
        self._take_former_names(mask_norm)
        for name in ("num_adapters", "bottleneck_size", "num_profiles"):
            require_positive(name, getattr(self, name))
        if self.num_profiles > MAX_PROFILES:
            raise ConfigError(
                f"num_profiles={self.num_profiles:,} is invalid: expected at most {MAX_PROFILES:,}, since a bank's "
                "rows have 32-bit numbers. Train fewer profiles at a time, and serve several banks."
            )
        if self.pool_dtype is not None:
            require_choice("pool_dtype", self.pool_dtype, ("float32", "bfloat16", "float16"))
        require_choice("mask_type", self.mask_type, MASK_TYPES)
        require_choice("estimator", self.estimator, ESTIMATORS)
        if self.mask_weighting is not None:
            require_choice("mask_weighting", self.mask_weighting, MASK_WEIGHTINGS)
            if self.mask_weighting == "signed" and self.mask_type != "hard":
                raise ConfigError(
                    'mask_weighting="signed" is invalid with mask_type="soft", whose weights are above 0. Pass '
                    'mask_type="hard", or another weighting.'
                )
        for name in ("temperature", "logit_scale"):
            require_number(name, getattr(self, name), above=0)
        if self.scale is not None:
            require_number("scale", self.scale, above=0)
        if self.gumbel_noise != 0:
            require_number("gumbel_noise", self.gumbel_noise, above=0)
        if isinstance(self.pool, os.PathLike):
            self.pool = os.fspath(self.pool)
        if isinstance(self.pool, AdapterPool):
            self._take_sizes(self.pool)
        elif not (self.pool is None or isinstance(self.pool, str)):
            raise ConfigError(f"pool={self.pool!r} is invalid: expected None, a folder or Hub id, or an AdapterPool.")
        if not isinstance(self.pool, str):
            self._check_top_k()

    def _take_former_names(self, mask_norm: str | None) -> None:
        """Read what earlier versions wrote."""
        if mask_norm is not None:
            former = FORMER_WEIGHTINGS.get(mask_norm, mask_norm)
            require_choice("mask_norm", former, MASK_WEIGHTINGS)
            if self.mask_weighting not in (None, former):
                raise ConfigError(
                    f"mask_weighting={self.mask_weighting!r} contradicts mask_norm={mask_norm!r}, its former name. "
                    "Pass mask_weighting alone."
                )
            self.mask_weighting = former
        self.mask_weighting = FORMER_WEIGHTINGS.get(self.mask_weighting or "", self.mask_weighting)
        self.estimator = FORMER_ESTIMATORS.get(self.estimator, self.estimator)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> XPEFTConfig:
        """The config in a folder or Hub repository, as PEFT reads it; a pool beside it is found there."""
        where = pretrained_model_name_or_path
        config: XPEFTConfig = super().from_pretrained(where, subfolder=subfolder, **kwargs)
        if Path(where).is_dir():
            config.pool = located(config.pool, os.path.join(where, subfolder or ""))
        elif located(config.pool, "") != config.pool:
            assert isinstance(config.pool, str)
            config.pool = HubPath.parse(where, kwargs.get("revision"), subfolder).name + config.pool[1:]
        return config

    def resolve_pool(self, base: nn.Module | None = None) -> AdapterPool:
        """The pool of this config, loaded if it is named by folder or id. Fields that depend on it are filled in.

        Args:
            base: decides the dtype of a random pool if ``pool_dtype`` does not. None: float32.
        """
        if self.pool is None:
            dtype = _dtype_for(base) if self.pool_dtype is None else dtype_from_name(self.pool_dtype)
            pool = AdapterPool.random(self.num_adapters, self.bottleneck_size, self.pool_seed, dtype=dtype)
        elif isinstance(self.pool, str):
            pool = AdapterPool.from_pretrained(self.pool)
        else:
            pool = self.pool
        self._take_sizes(pool)
        if self.top_k is None:
            self.top_k = max(1, self.num_adapters // 2)
        self._check_top_k()
        if self.scale is None:
            if pool.common is not None and pool.common.inside:
                self.scale = CENTRED_SCALE
            elif pool.kind == "random":
                self.scale = min(RANDOM_SCALE, STEERABLE / self.num_adapters)
            else:
                self.scale = 1.0 if self.top_k == 1 else AVERAGE_SCALE
        if self.mask_weighting is None:
            soft = pool.mask_weighting == "signed" and self.mask_type == "soft"
            self.mask_weighting = "variance" if soft else pool.mask_weighting
        default = AdapterForm()
        self.settle_form(
            AdapterForm(
                default.activation if pool.activation is None else pool.activation,
                default.layer_norm if pool.layer_norm is None else pool.layer_norm,
                default.insertion_form if pool.insertion_form is None else pool.insertion_form,
            )
        )
        return pool

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them: a pool by its id."""
        twin = copy.copy(self)
        if isinstance(twin.pool, AdapterPool):
            twin.pool = twin.pool.name_or_path
        return super(XPEFTConfig, twin).to_dict()

    card_payload = "masks and gains"

    def card_pool(self) -> CardPool:
        """Its name and size."""
        if isinstance(self.pool, AdapterPool):
            return CardPool(self.pool.name_or_path, self.pool.nbytes, needed=True)
        return CardPool(self.pool, 0 if self.pool is None else None, needed=self.pool is not None)

    def card_facts(self) -> list[tuple[str, object]]:
        """What a model card says of the pool and the masks."""
        chosen = f", {self.top_k} of {self.num_adapters} adapters" if self.mask_type == "hard" else ""
        pool = self.card_pool()
        return [
            ("pool", shown_name(pool.name) if pool.needed else f"random, seed {self.pool_seed}"),
            ("pool fingerprint", f"`{self.pool_fingerprint}`"),
            ("adapters per site, bottleneck size", f"{self.num_adapters}, {self.bottleneck_size}"),
            ("masks", self.mask_type + chosen),
            ("profiles", self.num_profiles),
        ]

    def _take_sizes(self, pool: AdapterPool) -> None:
        self.num_adapters, self.bottleneck_size = pool.num_adapters, pool.bottleneck_size
        if pool.kind == "random" and pool.common is None:
            assert pool.seed is not None
            self.pool, self.pool_seed, self.pool_dtype = None, pool.seed, str(pool.dtype).removeprefix("torch.")

    def _check_top_k(self) -> None:
        if self.top_k is None:
            return
        require_positive("top_k", self.top_k)
        if self.top_k > self.num_adapters:
            raise ConfigError(
                f"top_k={self.top_k} is invalid with {self.num_adapters} adapters in the pool: expected at most "
                f"{self.num_adapters}."
            )

    def mask_spec(self, num_sites: int) -> MaskSpec:
        """What the masks of this config are; its pool has been resolved."""
        assert self.top_k is not None
        assert self.scale is not None
        assert self.mask_weighting is not None
        return MaskSpec(
            num_profiles=self.num_profiles,
            num_sites=num_sites,
            num_adapters=self.num_adapters,
            mask_type=self.mask_type,
            top_k=self.top_k,
            weighting=self.mask_weighting,
            estimator=self.estimator,
            scale=self.scale,
            learn_gain=self.learn_gain,
        )


def _dtype_for(base: nn.Module | None) -> torch.dtype:
    """Of a random pool for a base: bfloat16 if most of its floating-point weights are, otherwise float32."""
    counts: dict[torch.dtype, int] = {}
    for parameter in () if base is None else base.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    most = max(counts, key=lambda dtype: counts[dtype], default=torch.float32)
    return torch.bfloat16 if most == torch.bfloat16 else torch.float32
