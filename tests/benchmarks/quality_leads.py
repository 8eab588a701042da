"""The study's leads: X-PEFT with one thing changed each."""

from dataclasses import replace

import torch
from quality_fitted import common_alone, fitted, random_around
from quality_method import k_hot, xpeft, xpeft_of
from quality_pools import ADAPTERS, SITES, cut_adapters, home_made, principal_adapters, trained_adapters, trained_loras

ATTENTION_PATTERN = r".*\.attention\.output\.dense"
BOTH_PATTERN = r".*\.output\.dense"
SIGNS_QV = {
    "target_modules": ["query", "value"],
    "mask_weighting": "signed",
    "scale": 0.1,
    "insertion_form": "parallel",
    "activation": "identity",
}


def soft_before(steps):
    """Hard masks that are trained as soft ones for so many steps, and repaired as hard ones in those that are left."""

    def prepare(model):
        masks = model.masks("default")
        hard = masks.spec
        masks.spec = replace(hard, mask_type="soft")
        passes = 0

        def count(model, arguments):
            nonlocal passes
            if model.training:
                passes += 1
            if passes > steps:
                masks.spec = hard

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


LEADS = {
    "scale": {
        "scale 0.03": k_hot(scale=0.03, search=False),
        "scale 0.1": k_hot(scale=0.1, search=False),
        "scale 1": k_hot(scale=1.0, search=False),
        "scale 3": k_hot(scale=3.0, search=False),
        "weights 1/k, scale 0.3": k_hot(mask_weighting="mean", search=False),
        "weights 1/k, scale 10": k_hot(mask_weighting="mean", scale=10.0, search=False),
    },
    "gain": {
        "no gain, scale 0.3": k_hot(learn_gain=False, search=False),
        "no gain, scale 1": k_hot(learn_gain=False, scale=1.0, search=False),
        "gain 3 times as fast": k_hot(optimizer=faster_gain(3), search=False),
        "gain 10 times as fast": k_hot(optimizer=faster_gain(10), search=False),
        "signs, 400 x 12, gain 3 times as fast": xpeft(
            400, 12, mask_weighting="signed", scale=0.1, optimizer=faster_gain(3), search=False
        ),
        "signs, 400 x 12, gain 10 times as fast": xpeft(
            400, 12, mask_weighting="signed", scale=0.1, optimizer=faster_gain(10), search=False
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
    "small": {
        "signs, 100 x 4": xpeft(100, 4, search=False),
        "signs, scale 0.3": xpeft(mask_weighting="signed", scale=0.3, search=False),
        "signs, 100 x 12": xpeft(100, 12, search=False),
        "signs, 100 x 8": xpeft(100, 8, search=False),
        "signs, 100 x 4, rate 0.3": xpeft(100, 4, start=0.3, search=False),
    },
    "last": {
        "signs, 100 x 12, last third": xpeft(100, 12, layers_to_transform=[4, 5], search=False),
        "signs, 300 x 12, last third": xpeft(300, 12, layers_to_transform=[4, 5], search=False),
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
        "signs, scale 0.3": xpeft(mask_weighting="signed", scale=0.3, search=False),
        "signs": xpeft(mask_weighting="signed", scale=0.1),
        "signs, 400 x 12": xpeft(400, 12, mask_weighting="signed", scale=0.1, search=False),
        "signs, 400 x 3": xpeft(400, 3, mask_weighting="signed", scale=0.1, search=False),
        "signs, 1600 x 3": xpeft(1600, 3, mask_weighting="signed", scale=0.03),
        "signs, query and value, 200 x 2": xpeft(200, 2, **SIGNS_QV),
        "signs, query and value, 50 x 2": xpeft(50, 2, **SIGNS_QV, search=False),
    },
    "common": {
        "mean of the trained pool": xpeft_of(
            trained_adapters, 48, top_k=ADAPTERS, scale=2.0, start=0.3, search=False, payload=2 * SITES
        ),
    },
    "fitted": {
        "common part of the fitted pool": xpeft_of(fitted, 392, payload=0, search=False, prepare=common_alone),
        "fitted pool, 392": xpeft_of(fitted, 392, search=False),
        "fitted pool, 392, of 21 groups": xpeft_of(fitted, 392, "intents", search=False),
        "random pool 392 x 12 around its common part": xpeft_of(random_around, 392, 12, search=False),
        "fitted pool, 392, gain 3": xpeft_of(fitted, 392, scale=3.0, search=False),
    },
    "merged": {  # for tasks on the base with the merged LoRA
        "common part of a pool fitted there": xpeft_of(
            fitted, 392, "domains", True, payload=0, search=False, prepare=common_alone
        ),
        "pool fitted there, 392": xpeft_of(fitted, 392, "domains", True, search=False),
    },
    "pool": {
        "uniform pool": xpeft_of(home_made, "uniform", mask_weighting="variance", scale=0.3, search=False),
        "orthogonal pool": xpeft_of(home_made, "orthogonal", mask_weighting="variance", scale=0.3, search=False),
        "antithetic pool": xpeft_of(home_made, "antithetic", mask_weighting="variance", scale=0.3, search=False),
        "centred pool": xpeft_of(home_made, "centred", mask_weighting="variance", scale=0.3, search=False),
        "trained pool": xpeft_of(trained_adapters, 48, scale=1.0),
        "trained pool, variance": xpeft_of(trained_adapters, 48, mask_weighting="variance", scale=0.3, search=False),
        "trained pool, soft": xpeft_of(trained_adapters, 48, mask_type="soft", scale=1.0, search=False),
        "trained pool, scale 2": xpeft_of(trained_adapters, 48, scale=2.0, start=0.3, search=False),
        "trained pool, scale 4": xpeft_of(trained_adapters, 48, scale=4.0, start=0.3, search=False),
        "trained pool, cut 112 x 12, scale 2": xpeft_of(cut_adapters, 12, scale=2.0, start=0.3, search=False),
        "trained pool, cut 112 x 12, scale 8": xpeft_of(cut_adapters, 12, scale=8.0, start=0.3, search=False),
        "principal directions, signs": xpeft_of(principal_adapters, 48, mask_weighting="signed", scale=1.0, start=0.3),
        "trained pool, signs": xpeft_of(trained_adapters, 48, mask_weighting="signed", scale=0.3, search=False),
        "LoRA pool, scale 2": xpeft_of(
            trained_loras, 8, insertion_form="parallel", activation="identity", scale=2.0, start=0.3, search=False
        ),
    },
}
"""Of X-PEFT, 100 x 48 and hard unless they say otherwise: a line of the study each."""
