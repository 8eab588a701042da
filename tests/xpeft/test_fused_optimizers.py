"""Optimizers that change parameters without raising torch's version counter."""

import copy

import pytest
import torch
from peft import get_peft_model

from peft_xmask import MagnitudeMaskConfig, WeightAdapterConfig, XPEFTConfig

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
