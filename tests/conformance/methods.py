"""The methods under test: one row each. A new tuner joins the matrix here and nowhere else."""

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftModel

from peft_xmask import BottleneckConfig, MagnitudeMaskConfig, WeightAdapterConfig, XPEFTConfig


@dataclass(frozen=True)
class Method:
    """How the matrix makes a method's adapters.

    Attributes:
        config_cls: its config class.
        fields: with which its adapter is small and changes the outputs from the start.
        prefix: of its state's names.
        linear: whether it can be merged.
        supports_mixed_batch: whether one batch can use several of its adapters.
        starts_at_base: whether an adapter can start without changing the outputs.
        packed: whether an adapter loaded for inference has other state than one in training.
        strong: fields for PEFT's suites of transformers, so that tiny language models write another text.
        mild: fields for PEFT's custom suite, whose large steps of SGD must end in finite numbers.
    """

    name: str
    config_cls: type[PeftConfig]
    fields: dict[str, Any]
    prefix: str
    linear: bool
    supports_mixed_batch: bool = True
    starts_at_base: bool = True
    packed: bool = False
    strong: dict[str, Any] = field(default_factory=dict)
    mild: dict[str, Any] = field(default_factory=dict)

    def config(self, **fields: Any) -> PeftConfig:
        """A config with these fields besides its own."""
        return self.config_cls(**{**self.fields, **fields})

    def owns(self, parameter_name: str) -> bool:
        """Whether a parameter belongs to the method, by its name."""
        return self.prefix in parameter_name

    def spoil(self, model: PeftModel, adapter_name: str = "default") -> None:
        """Put NaN into what the adapter trains."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if self.owns(name) and f".{adapter_name}." in name:
                    parameter.fill_(torch.nan)

    def shift(self, model: PeftModel, adapter_name: str = "default") -> None:
        """Change what the adapter trains by a fixed pattern, large enough to choose other masks."""
        generator = torch.Generator().manual_seed(17)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if self.owns(name) and f".{adapter_name}." in name:
                    parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator).to(parameter))


XPEFT = dict(num_adapters=12, bottleneck_size=8, scale=1.0)
MASKS: dict[str, Any] = dict(starts_at_base=False, packed=True, strong={"scale": 10.0})
BOTTLENECK = dict(bottleneck_size=4, init_weights=False, scale=100.0)
MASKED = dict(density=0.2, init_weights=False)
OVER_WEIGHTS = dict(target="both", r=4, adapter_bias=True, init_weights=False)
LINEAR_BOTTLENECK = dict(activation="identity", use_bias=False, insertion_form="parallel")

METHODS = [
    Method("xpeft", XPEFTConfig, XPEFT, "xpeft_", linear=False, **MASKS, mild={"logit_scale": 0.3, "scale": 0.5}),
    Method(
        "xpeft-soft",
        XPEFTConfig,
        {**XPEFT, "mask_type": "soft", "activation": "gelu"},
        "xpeft_",
        linear=False,
        **MASKS,
        mild={"logit_scale": 0.3, "scale": 2.0},
    ),
    Method(
        "xpeft-identity",
        XPEFTConfig,
        {**XPEFT, "activation": "identity", "mask_weighting": "variance"},
        "xpeft_",
        linear=True,
        **MASKS,
        mild={"logit_scale": 0.3, "scale": 0.5},
    ),
    Method("bottleneck", BottleneckConfig, BOTTLENECK, "bottleneck_adapter_", linear=False, mild={"scale": 10.0}),
    Method(
        "bottleneck-identity",
        BottleneckConfig,
        {**BOTTLENECK, **LINEAR_BOTTLENECK},
        "bottleneck_adapter_",
        linear=True,
        mild={"scale": 10.0},
    ),
    Method("magnitude-mask", MagnitudeMaskConfig, MASKED, "magnitude_mask_", linear=True),
    Method(
        "weight-adapter",
        WeightAdapterConfig,
        OVER_WEIGHTS,
        "weight_adapter_",
        linear=True,
        packed=True,
        mild={"scale": 0.3},
    ),
]
