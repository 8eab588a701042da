"""The methods of the quality benchmark, and groups of them."""

import torch
from peft import (
    BeftConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeanutConfig,
    PolyConfig,
    ShiraConfig,
    SupertuningConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
)
from peft.utils.constants import DUMMY_TARGET_MODULES
from quality_leads import LEADS
from quality_method import Method, k_hot, of, xpeft

from peft_xmask import BottleneckConfig, MagnitudeMaskConfig, WeightAdapterConfig

QV = {"target_modules": ["query", "value"]}
FFN_PATTERN = r".*\.layer\.\d+\.(intermediate|output)\.dense"
LINEAR_PATTERN = r".*\.layer\.\d+\..*(query|key|value|dense)"


def train_ffn_biases(model):
    """Make ordinary parameters of the biases of both feed-forward linears."""
    for name, parameter in model.named_parameters():
        if name.endswith(("intermediate.dense.bias", "output.dense.bias")) and ".attention." not in name:
            parameter.requires_grad_(True)


def route_only(model):
    """Freeze Poly's library of skills, which is shared, and make every example one of its only task."""
    for name, parameter in model.named_parameters():
        if ".poly_lora_" in name:
            parameter.requires_grad_(False)

    def name_task(model, arguments, named):
        return arguments, {**named, "task_ids": torch.zeros(len(named["input_ids"]), dtype=torch.long)}

    model.register_forward_pre_hook(name_task, with_kwargs=True)


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
    "Poly, routing only, 100 skills": Method(
        of(PolyConfig, **QV, r=2, n_tasks=1, n_skills=100, n_splits=1, init_weights=False),
        start=0.1,
        prepare=route_only,
        saves_more=True,
    ),
    "Uni-LoRA d=256": Method(of(UniLoraConfig, **QV), start=1e-2),
    "LoRA r=1": Method(of(LoraConfig, r=1, lora_alpha=2), start=1e-2),
    "LoRA r=8": Method(of(LoraConfig, r=8, lora_alpha=16), start=1e-2),
    "LoRA r=16, FFN": Method(of(LoraConfig, r=16, lora_alpha=16, target_modules=FFN_PATTERN)),
    "PEANuT r=16": Method(of(PeanutConfig, r=16, target_modules=FFN_PATTERN)),
    "SHiRA r=1": Method(of(ShiraConfig, r=1, target_modules=LINEAR_PATTERN), start=3e-2),
    "Super-Tuning 0.5 %": Method(
        of(SupertuningConfig, sparsity=0.995, select_top=False, target_modules=LINEAR_PATTERN), start=1e-2
    ),
    "bottleneck b=24": Method(of(BottleneckConfig, bottleneck_size=24)),
    "bottleneck b=48": Method(of(BottleneckConfig, bottleneck_size=48)),
    "X-PEFT hard 100 x 48": k_hot(100, 48),
    "X-PEFT hard 400 x 12": k_hot(400, 12),
    "X-PEFT soft 100 x 48": k_hot(100, 48, mask_type="soft"),
    "X-PEFT hard 96 x 50": k_hot(96, 50),
    "X-PEFT hard 392 x 12": k_hot(392, 12),
    "X-PEFT signs 96 x 50": xpeft(96, 50, mask_weighting="signed", scale=0.1),
    "X-PEFT signs 392 x 12": xpeft(392, 12, mask_weighting="signed", scale=0.1),
    "X-PEFT signs 392 x 12, identity": xpeft(392, 12, mask_weighting="signed", scale=0.1, activation="identity"),
    "X-PEFT signs 1568 x 3": xpeft(1568, 3, mask_weighting="signed", scale=0.03, search=False),
    "X-PEFT signs 3136 x 2": xpeft(3136, 2, mask_weighting="signed", search=False),
    "magnitude mask 0.5 %": Method(of(MagnitudeMaskConfig, density=0.005), start=1e-2),
    "magnitude mask 1/256": Method(of(MagnitudeMaskConfig, density=1 / 256), start=1e-2),  # as many as SHiRA r=1
    "magnitude mask 0.5 %, largest": Method(of(MagnitudeMaskConfig, density=0.005, selection="largest"), start=1e-2),
    "magnitude mask 0.5 %, random": Method(of(MagnitudeMaskConfig, density=0.005, selection="random"), start=1e-2),
    "weight adapter, bias r=1": Method(of(WeightAdapterConfig, r=1), start=1e-2),
    "weight adapter, bias r=4": Method(of(WeightAdapterConfig, r=4), start=1e-2),
    "weight adapter, bias r=16": Method(of(WeightAdapterConfig, r=16)),
    "weight adapter, bias r=64": Method(of(WeightAdapterConfig, r=64)),
    "weight adapter, weight r=16": Method(of(WeightAdapterConfig, target="weight", r=16)),
}
METHODS |= {f"X-PEFT, {name}": method for lead in LEADS.values() for name, method in lead.items()}
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
        "magnitude mask 0.5 %, largest", "magnitude mask 0.5 %, random", "magnitude mask 1/256",
    ],
    "frontier": [
        "head only", "X-PEFT hard 96 x 50", "X-PEFT hard 392 x 12", "X-PEFT signs 96 x 50", "X-PEFT signs 392 x 12",
        "X-PEFT signs 392 x 12, identity", "X-PEFT signs 1568 x 3", "X-PEFT signs 3136 x 2", "X-PEFT soft 100 x 48",
        "LoRA r=1", "LoRA r=8", "bottleneck b=48", "IA3", "LN tuning", "BitFit, FFN", "Uni-LoRA d=256", "VeRA r=256",
        "VB-LoRA", "Poly, routing only, 100 skills",
    ],
    "few": ["head only", "X-PEFT hard 96 x 50", "X-PEFT hard 392 x 12", "LoRA r=8", "bottleneck b=48"],
    **{f"lead-{lead}": [f"X-PEFT, {name}" for name in names] for lead, names in LEADS.items()},
}  # fmt: skip
