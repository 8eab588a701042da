"""The PEFT methods that the command line, the demo and the benchmarks know by name."""

from __future__ import annotations

import dataclasses

from peft import LoraConfig, PeftConfig

from ..errors import ConfigError
from ..pool import BOTTLENECK_SIZE, NUM_ADAPTERS, AdapterPool
from ..tuners.base.peft_private import DUMMY_TARGET_MODULES
from ..tuners.bottleneck import BottleneckConfig
from ..tuners.magnitude_mask import MagnitudeMaskConfig
from ..tuners.weight_adapter import WeightAdapterConfig
from ..tuners.xpeft import XPEFTConfig

METHODS = ("xpeft", "bottleneck", "magnitude-mask", "weight-adapter", "lora", "head")
LEARNING_RATES = {
    "xpeft": 1e-2,
    "bottleneck": 3e-3,
    "magnitude-mask": 1e-2,
    "weight-adapter": 3e-3,
    "lora": 3e-3,
    "head": 3e-2,
}
"""Default learning rate of each method; X-PEFT's masks have another. docs/demo.md and docs/benchmarks.md say why."""
HEAD_LEARNING_RATE = 3e-2
"""Default learning rate of the head, with every method."""


def method_config(
    method: str,
    *,
    num_adapters: int = NUM_ADAPTERS,
    bottleneck_size: int | None = None,
    pool: str | AdapterPool | None = None,
    pool_seed: int = 0,
    mask_type: str = "hard",
    top_k: int | None = None,
    lora_rank: int = 8,
    density: float = 0.005,
    target: str = "bias",
    adapter_rank: int = 16,
) -> PeftConfig:
    """PEFT config of a method by its name, for sequence classification; every other field at its default.

    ``bottleneck_size`` of None is the method's own default.

    ``"head"`` is a LoRA config that targets nothing: PEFT then trains and saves the classification head alone.

    Raises:
        ConfigError: an unknown method, or a value the method refuses.
    """
    if method == "xpeft":
        return XPEFTConfig(
            task_type="SEQ_CLS",
            pool=pool,
            num_adapters=num_adapters,
            bottleneck_size=BOTTLENECK_SIZE if bottleneck_size is None else bottleneck_size,
            pool_seed=pool_seed,
            mask_type=mask_type,
            top_k=top_k,
        )
    if method == "bottleneck":
        config = BottleneckConfig(task_type="SEQ_CLS")
        if bottleneck_size is not None:
            config = dataclasses.replace(config, bottleneck_size=bottleneck_size)
        return config
    if method == "magnitude-mask":
        return MagnitudeMaskConfig(task_type="SEQ_CLS", density=density)
    if method == "weight-adapter":
        return WeightAdapterConfig(task_type="SEQ_CLS", target=target, r=adapter_rank)
    if method == "lora":
        return LoraConfig(task_type="SEQ_CLS", r=lora_rank, lora_alpha=2 * lora_rank)
    if method == "head":
        return LoraConfig(task_type="SEQ_CLS", target_modules=DUMMY_TARGET_MODULES)
    raise ConfigError(f"method={method!r} is unknown: expected one of {', '.join(METHODS)}.")
