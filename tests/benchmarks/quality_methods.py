"""The methods of the quality benchmark: a PEFT config each, and the learning rate at which the search starts."""

from collections.abc import Callable
from dataclasses import dataclass, field

from peft import (
    BeftConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeanutConfig,
    PeftConfig,
    ShiraConfig,
    SupertuningConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
)
from peft.utils.constants import DUMMY_TARGET_MODULES

from peft_xmask import BottleneckConfig, MagnitudeMaskConfig, WeightAdapterConfig, XPEFTConfig

QV = {"target_modules": ["query", "value"]}
FFN_PATTERN = r".*\.layer\.\d+\.(intermediate|output)\.dense"
LINEAR_PATTERN = r".*\.layer\.\d+\..*(query|key|value|dense)"


def nothing(model):
    """Train what the config says."""


def train_ffn_biases(model):
    """Make ordinary parameters of the biases of both feed-forward linears."""
    for name, parameter in model.named_parameters():
        if name.endswith(("intermediate.dense.bias", "output.dense.bias")) and ".attention." not in name:
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class Method:
    """How a method is put on the base.

    Attributes:
        config: makes its PEFT config.
        start: learning rate at which the search starts.
        masks: whether the learning rate that is searched is that of X-PEFT's masks.
        prepare: what is done to the model beside it.
    """

    config: Callable[[], PeftConfig]
    start: float = 3e-3
    masks: bool = False
    prepare: Callable[[object], None] = field(default=nothing)


def of(kind, **settings):
    return lambda: kind(task_type="SEQ_CLS", **settings)


def xpeft(num_adapters, bottleneck_size, **settings):
    made = of(XPEFTConfig, num_adapters=num_adapters, bottleneck_size=bottleneck_size, **settings)
    return Method(made, start=0.1, masks=True)


HEAD_ONLY = of(LoraConfig, target_modules=DUMMY_TARGET_MODULES)
METHODS = {
    "head only": Method(HEAD_ONLY),
    "BitFit, FFN": Method(HEAD_ONLY, start=3e-2, prepare=train_ffn_biases),
    "BEFT": Method(of(BeftConfig), start=0.1),
    "LN tuning": Method(of(LNTuningConfig, target_modules=["LayerNorm"]), start=1e-2),
    "IA3": Method(of(IA3Config), start=3e-2),
    "VeRA r=256": Method(of(VeraConfig), start=0.1),
    "VB-LoRA": Method(
        of(VBLoRAConfig, target_modules=["query", "value"], vector_length=64, save_only_topk_weights=True), start=1e-2
    ),
    "Uni-LoRA d=256": Method(of(UniLoraConfig, **QV), start=1e-2),
    "LoRA r=1": Method(of(LoraConfig, r=1, lora_alpha=2), start=1e-2),
    "LoRA r=8": Method(of(LoraConfig, r=8, lora_alpha=16), start=1e-2),
    "LoRA r=16, FFN": Method(of(LoraConfig, r=16, lora_alpha=16, target_modules=FFN_PATTERN)),
    "PEANuT r=16": Method(of(PeanutConfig, r=16, target_modules=FFN_PATTERN)),
    "SHiRA r=1": Method(of(ShiraConfig, r=1, target_modules=LINEAR_PATTERN), start=3e-2),
    "Super-Tuning 0.5 %": Method(
        of(SupertuningConfig, sparsity=0.995, select_top=False, target_modules=LINEAR_PATTERN), start=3e-2
    ),
    "bottleneck b=24": Method(of(BottleneckConfig, bottleneck_size=24)),
    "bottleneck b=48": Method(of(BottleneckConfig, bottleneck_size=48)),
    "X-PEFT hard 100 x 48": xpeft(100, 48),
    "X-PEFT hard 400 x 12": xpeft(400, 12),
    "X-PEFT soft 100 x 48": xpeft(100, 48, mask_type="soft"),
    "magnitude mask 0.5 %": Method(of(MagnitudeMaskConfig, density=0.005), start=3e-2),
    "magnitude mask 0.5 %, largest": Method(of(MagnitudeMaskConfig, density=0.005, selection="largest"), start=3e-2),
    "magnitude mask 0.5 %, random": Method(of(MagnitudeMaskConfig, density=0.005, selection="random"), start=3e-2),
    "weight adapter, bias r=1": Method(of(WeightAdapterConfig, r=1), start=1e-2),
    "weight adapter, bias r=4": Method(of(WeightAdapterConfig, r=4), start=1e-2),
    "weight adapter, bias r=16": Method(of(WeightAdapterConfig, r=16)),
    "weight adapter, bias r=64": Method(of(WeightAdapterConfig, r=64)),
    "weight adapter, weight r=16": Method(of(WeightAdapterConfig, target="weight", r=16)),
}
GROUPS = {
    "typology": [
        "head only", "LN tuning", "IA3", "VeRA r=256", "Uni-LoRA d=256", "LoRA r=1", "LoRA r=8", "bottleneck b=24",
        "X-PEFT hard 100 x 48", "X-PEFT hard 400 x 12", "magnitude mask 0.5 %", "weight adapter, bias r=16",
    ],
    "weight-adapter": [
        "head only", "BitFit, FFN", "BEFT", "LoRA r=16, FFN", "weight adapter, bias r=1", "weight adapter, bias r=4",
        "weight adapter, bias r=16", "weight adapter, bias r=64", "weight adapter, weight r=16",
    ],
    "magnitude-mask": [
        "head only", "LoRA r=1", "SHiRA r=1", "Super-Tuning 0.5 %", "magnitude mask 0.5 %",
        "magnitude mask 0.5 %, largest", "magnitude mask 0.5 %, random",
    ],
}  # fmt: skip
