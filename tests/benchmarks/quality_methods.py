"""The methods of the quality benchmark: a PEFT config each, and the learning rate at which the search starts."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from peft import (
    BeftConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeanutConfig,
    PeftConfig,
    PolyConfig,
    ShiraConfig,
    SupertuningConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
)
from peft.utils.constants import DUMMY_TARGET_MODULES
from quality_pools import cut_adapters, home_made, principal_adapters, trained_adapters, trained_loras

from peft_xmask import BottleneckConfig, MagnitudeMaskConfig, WeightAdapterConfig, XPEFTConfig
from peft_xmask.classify import MakesOptimizer, adamw

QV = {"target_modules": ["query", "value"]}
FFN_PATTERN = r".*\.layer\.\d+\.(intermediate|output)\.dense"
ATTENTION_PATTERN = r".*\.attention\.output\.dense"
BOTH_PATTERN = r".*\.output\.dense"
LINEAR_PATTERN = r".*\.layer\.\d+\..*(query|key|value|dense)"


def nothing(model):
    """Train what the config says."""


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


@dataclass(frozen=True)
class Method:
    """How a method is put on the base.

    Attributes:
        config: makes its PEFT config.
        start: learning rate at which the search starts.
        masks: whether the learning rate that is searched is that of X-PEFT's masks.
        prepare: what is done to the model beside it.
        optimizer: makes it from the head's group of parameters and the method's.
        warmup: share of the steps in which rates rise.
        search: whether the rate is searched; if not, it is ``start``.
        saves_more: whether its file has frozen numbers, which are no part of a profile, beside what is trained.
    """

    config: Callable[[], PeftConfig]
    start: float = 3e-3
    masks: bool = False
    prepare: Callable[[object], None] = field(default=nothing)
    optimizer: MakesOptimizer = adamw
    warmup: float = 0.06
    search: bool = True
    saves_more: bool = False


def of(kind, task_type="SEQ_CLS", **settings):
    return lambda: kind(task_type=task_type, **settings)


TRAINING = ("prepare", "optimizer", "warmup", "search")
"""Of what an X-PEFT method is told, all that is not of its config."""


def xpeft(num_adapters=100, bottleneck_size=48, *, start=0.1, **settings):
    training = {name: settings.pop(name) for name in TRAINING if name in settings}
    made = of(XPEFTConfig, num_adapters=num_adapters, bottleneck_size=bottleneck_size, **settings)
    return Method(made, start=start, masks=True, **training)


def xpeft_of(pool, *arguments, start=0.1, search=True, **settings):
    """X-PEFT over a pool that is made when it is first wanted."""

    def made():
        return XPEFTConfig(task_type="SEQ_CLS", pool=pool(*arguments), **settings)

    return Method(made, start=start, masks=True, search=search)


def k_hot(*sizes, **settings):
    """X-PEFT whose masks add what is chosen and leave out the rest; gains start at 0.3."""
    return xpeft(*sizes, **{"mask_norm": "variance", "scale": 0.3, **settings})


def soft_before(steps):
    """Hard masks that are trained as soft ones for so many steps, and repaired as hard ones in those that are left."""

    def prepare(model):
        specs = model.base_model.table.specs
        hard = specs["default"]
        specs["default"] = replace(hard, mask_type="soft")
        passes = 0

        def count(model, arguments):
            nonlocal passes
            if model.training:
                passes += 1
            if passes > steps:
                specs["default"] = hard

        model.register_forward_pre_hook(count)

    return prepare


def decaying(rate):
    """AdamW whose logits and gains shrink by ``rate`` times the learning rate in each step."""

    def made(groups):
        return torch.optim.AdamW([{**group, "weight_decay": rate * number} for number, group in enumerate(groups)])

    return made


def sign_steps(groups):
    """AdamW for the head; for the masks steps of the gradient's sign, without any memory."""
    betas = [(0.9, 0.999), (0.0, 0.0)]
    return torch.optim.AdamW([{**g, "betas": b} for g, b in zip(groups, betas, strict=True)], weight_decay=0.0)


def slow(groups):
    """AdamW whose masks follow a mean of fifty gradients instead of ten."""
    betas = [(0.9, 0.999), (0.98, 0.999)]
    return torch.optim.AdamW([{**g, "betas": b} for g, b in zip(groups, betas, strict=True)], weight_decay=0.0)


def faster_gain(times):
    """AdamW whose gains, the smaller of the masks' two tensors, have a rate that is so many times the masks'."""

    def made(groups):
        head, masks = groups
        gain, logits = sorted(masks["params"], key=torch.Tensor.numel)
        groups = [head, {"params": [logits], "lr": masks["lr"]}, {"params": [gain], "lr": times * masks["lr"]}]
        return torch.optim.AdamW(groups, weight_decay=0.0)

    return made


SIGNS_QV = {
    **QV, "mask_norm": "signs", "scale": 0.1, "insertion_form": "parallel", "activation": "identity"
}  # fmt: skip
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
    "X-PEFT signs 96 x 50": xpeft(96, 50, mask_norm="signs", scale=0.1),
    "X-PEFT signs 392 x 12": xpeft(392, 12, mask_norm="signs", scale=0.1),
    "X-PEFT signs 392 x 12, identity": xpeft(392, 12, mask_norm="signs", scale=0.1, activation="identity"),
    "X-PEFT signs 1568 x 3": xpeft(1568, 3, mask_norm="signs", scale=0.03, search=False),
    "X-PEFT signs 3136 x 2": xpeft(3136, 2, mask_norm="signs", search=False),
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
LEADS = {
    "scale": {
        "scale 0.03": k_hot(scale=0.03, search=False),
        "scale 0.1": k_hot(scale=0.1, search=False),
        "scale 1": k_hot(scale=1.0, search=False),
        "scale 3": k_hot(scale=3.0, search=False),
        "weights 1/k, scale 0.3": k_hot(mask_norm="mean", search=False),
        "weights 1/k, scale 10": k_hot(mask_norm="mean", scale=10.0, search=False),
    },
    "gain": {
        "no gain, scale 0.3": k_hot(learn_gain=False, search=False),
        "no gain, scale 1": k_hot(learn_gain=False, scale=1.0, search=False),
        "gain 3 times as fast": k_hot(optimizer=faster_gain(3), search=False),
        "gain 10 times as fast": k_hot(optimizer=faster_gain(10), search=False),
        "signs, 400 x 12, gain 3 times as fast": xpeft(
            400, 12, mask_norm="signs", scale=0.1, optimizer=faster_gain(3), search=False
        ),
        "signs, 400 x 12, gain 10 times as fast": xpeft(
            400, 12, mask_norm="signs", scale=0.1, optimizer=faster_gain(10), search=False
        ),
    },
    "estimator": {
        "softmax estimator": k_hot(estimator="softmax"),
        "sigmoid estimator": k_hot(estimator="sigmoid"),
        "Gumbel noise 0.3": k_hot(gumbel_noise=0.3, search=False),
        "Gumbel noise 1": k_hot(gumbel_noise=1.0, search=False),
        "soft": k_hot(mask_type="soft"),
        "soft for 80 steps, then hard": k_hot(prepare=soft_before(80)),
    },
    "cut": {
        "25 x 192": k_hot(25, 192),
        "50 x 96": k_hot(50, 96),
        "1600 x 3": k_hot(1600, 3, search=False),
    },
    "width": {
        "100 x 12": k_hot(100, 12),
        "100 x 6": k_hot(100, 6),
        "100 x 3": k_hot(100, 3),
        "100 x 1": k_hot(100, 1),
        "400 x 3": k_hot(400, 3, search=False),
        "400 x 1": k_hot(400, 1, search=False),
    },
    "chosen": {
        "k = N/4": k_hot(top_k=25, search=False),
        "k = N/10": k_hot(top_k=10, search=False),
        "k = 3N/4": k_hot(top_k=75, search=False),
    },
    "place": {
        "attention output": k_hot(target_modules=ATTENTION_PATTERN, search=False),
        "both outputs": k_hot(target_modules=BOTH_PATTERN, search=False),
        "both outputs, 48 x 48": k_hot(48, 48, target_modules=BOTH_PATTERN, search=False),
        "parallel": k_hot(insertion_form="parallel", search=False),
        "gelu": k_hot(activation="gelu", search=False),
        "identity": k_hot(activation="identity", search=False),
        "norm before activation": k_hot(layer_norm=True, search=False),
    },
    "optimiser": {
        "decay 1": k_hot(optimizer=decaying(1.0), search=False),
        "decay 3": k_hot(optimizer=decaying(3.0), search=False),
        "sign steps": k_hot(optimizer=sign_steps, search=False),
        "mean of 50 gradients": k_hot(optimizer=slow, search=False),
        "no warm-up": k_hot(warmup=0.0, search=False),
        "warm-up of 30 %": k_hot(warmup=0.3, search=False),
    },
    "signs": {
        "signs, scale 0.3": xpeft(mask_norm="signs", scale=0.3, search=False),
        "signs": xpeft(mask_norm="signs", scale=0.1),
        "signs, 400 x 12": xpeft(400, 12, mask_norm="signs", scale=0.1, search=False),
        "signs, 400 x 3": xpeft(400, 3, mask_norm="signs", scale=0.1, search=False),
        "signs, 1600 x 3": xpeft(1600, 3, mask_norm="signs", scale=0.03),
        "signs, query and value, 200 x 2": xpeft(200, 2, **SIGNS_QV),
        "signs, query and value, 50 x 2": xpeft(50, 2, **SIGNS_QV, search=False),
    },
    "pool": {
        "uniform pool": xpeft_of(home_made, "uniform", mask_norm="variance", scale=0.3, search=False),
        "orthogonal pool": xpeft_of(home_made, "orthogonal", mask_norm="variance", scale=0.3, search=False),
        "antithetic pool": xpeft_of(home_made, "antithetic", mask_norm="variance", scale=0.3, search=False),
        "centred pool": xpeft_of(home_made, "centred", mask_norm="variance", scale=0.3, search=False),
        "trained pool": xpeft_of(trained_adapters, 48, scale=1.0),
        "trained pool, variance": xpeft_of(trained_adapters, 48, mask_norm="variance", scale=0.3, search=False),
        "trained pool, soft": xpeft_of(trained_adapters, 48, mask_type="soft", scale=1.0, search=False),
        "trained pool, scale 2": xpeft_of(trained_adapters, 48, scale=2.0, start=0.3, search=False),
        "trained pool, scale 4": xpeft_of(trained_adapters, 48, scale=4.0, start=0.3, search=False),
        "trained pool, cut 112 x 12, scale 2": xpeft_of(cut_adapters, 12, scale=2.0, start=0.3, search=False),
        "trained pool, cut 112 x 12, scale 8": xpeft_of(cut_adapters, 12, scale=8.0, start=0.3, search=False),
        "principal directions, signs": xpeft_of(principal_adapters, 48, mask_norm="signs", scale=1.0, start=0.3),
        "trained pool, signs": xpeft_of(trained_adapters, 48, mask_norm="signs", scale=0.3, search=False),
        "LoRA pool, scale 2": xpeft_of(
            trained_loras, 8, insertion_form="parallel", activation="identity", scale=2.0, start=0.3, search=False
        ),
    },
}
"""Of X-PEFT, 100 x 48 and hard unless they say otherwise: a line of the study each."""
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
