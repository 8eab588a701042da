"""The methods under test: one row each. A new tuner joins the matrix here and nowhere else."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel

from peft_xmask import BottleneckConfig, XPEFTConfig


@dataclass(frozen=True)
class Method:
    """How the matrix makes a method's adapters.

    Attributes:
        config: builds a config whose adapter changes the outputs from the start; takes any field of the config.
        prefix: of its state's names.
        linear: whether it can be merged.
        in_base_dtype: whether training in half precision without PEFT's cast to float32 keeps the base's dtype.
    """

    name: str
    config: Callable[..., PeftConfig]
    prefix: str
    linear: bool

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


def xpeft(**fields: Any) -> XPEFTConfig:
    """Hard masks over a small random pool, strong enough that two profiles clearly differ."""
    return XPEFTConfig(**{"num_adapters": 12, "bottleneck_size": 4, "scale": 1.0, **fields})


def bottleneck(**fields: Any) -> BottleneckConfig:
    return BottleneckConfig(**{"bottleneck_size": 4, "init_weights": False, "scale": 100.0, **fields})


METHODS = [
    Method("xpeft", xpeft, "xpeft_", linear=False),
    Method("xpeft-soft-gelu", lambda **f: xpeft(mask_type="soft", activation="gelu", **f), "xpeft_", linear=False),
    Method("xpeft-identity", lambda **f: xpeft(activation="identity", **f), "xpeft_", linear=True),
    Method("bottleneck", bottleneck, "bottleneck_adapter_", linear=False),
    Method(
        "bottleneck-identity",
        lambda **f: bottleneck(activation="identity", use_bias=False, insertion_form="parallel", **f),
        "bottleneck_adapter_",
        linear=True,
    ),
]
