"""Optimizers that change parameters without raising torch's version counter."""

import copy

import pytest
import torch
from peft import get_peft_model

from peft_xmask import MagnitudeMaskConfig, WeightAdapterConfig, XPEFTConfig
from peft_xmask.errors import StaleGraphError

CONFIGS = {
    "xpeft": lambda: XPEFTConfig(num_adapters=20, bottleneck_size=4, scale=3.0),
    "magnitude mask": lambda: MagnitudeMaskConfig(density=0.1),
    "weight adapter": lambda: WeightAdapterConfig(target="bias", r=4),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_fused_step_between_two_evaluations_is_seen(kind, tiny_bert, tiny_batch):
    """The second evaluation must not be answered from what was mixed or written for the first."""
    outputs = {}
    for fused in (True, False):
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(tiny_bert()), CONFIGS[kind]()).eval()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.05, fused=fused, foreach=False)
        model(**tiny_batch).logits.square().sum().backward()
        with torch.no_grad():
            before = model(**tiny_batch).logits
            optimizer.step()
            outputs[fused] = model(**tiny_batch).logits
        assert not torch.equal(outputs[fused], before)
    torch.testing.assert_close(outputs[True], outputs[False])


IN_BETWEEN = {
    "xpeft": CONFIGS["xpeft"],
    "soft xpeft": lambda: XPEFTConfig(num_adapters=20, bottleneck_size=4, scale=3.0, mask_type="soft"),
    "magnitude mask": CONFIGS["magnitude mask"],
    "weight adapter": CONFIGS["weight adapter"],
    "weight adapter over weights": lambda: WeightAdapterConfig(target="weight", r=4),
    "weight adapter over LayerNorm": lambda: WeightAdapterConfig(target="bias", r=4, target_modules=["LayerNorm"]),
}


@pytest.mark.parametrize("kind", IN_BETWEEN)
def test_a_fused_step_between_a_forward_pass_and_its_backward_pass_is_refused_or_harmless(kind, tiny_bert, tiny_batch):
    gradients = []
    for steps in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(tiny_bert()), IN_BETWEEN[kind]()).train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(0.02 * torch.randn(parameter.shape))
        optimizer = torch.optim.AdamW(trained, lr=0.05, fused=True)
        model(**tiny_batch).logits.square().sum().backward()
        loss = model(**tiny_batch).logits.square().sum()
        if steps:
            optimizer.step()
        optimizer.zero_grad()
        try:
            loss.backward()
        except StaleGraphError:
            assert steps
            return
        gradients.append([parameter.grad for parameter in trained])
    assert all(each.any() for each in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0])
