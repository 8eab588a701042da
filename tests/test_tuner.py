"""Mixed batches: one adapter name for each example, whatever shape a model gives its modules."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from peft_xmask import BottleneckConfig, XPEFTConfig

CONFIGS = {
    "bottleneck": lambda **fields: BottleneckConfig(bottleneck_size=4, init_weights=False, scale=50.0, **fields),
    "xpeft": lambda **fields: XPEFTConfig(num_adapters=8, bottleneck_size=4, scale=1.0, **fields),
}
NAMES = ["default", "__base__", "other"]


def opt() -> nn.Module:
    """OPT's feed-forward network reads all tokens of a batch as one list."""
    sizes = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24)
    return OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16, max_position_embeddings=32, init_std=0.2))


def with_two_adapters(base: nn.Module, method: str, **fields) -> PeftModel:
    model = get_peft_model(base, CONFIGS[method](**fields))
    model.add_adapter("other", CONFIGS[method](**fields))
    return model.eval()


@pytest.mark.parametrize("method", CONFIGS)
def test_each_example_has_its_adapter_where_a_model_reads_tokens_as_one_list(method):
    torch.manual_seed(0)
    model = with_two_adapters(opt(), method, task_type="CAUSAL_LM")
    tokens = torch.randint(3, 40, (3, 5))
    with torch.no_grad():
        mixed = model(input_ids=tokens, adapter_names=NAMES).logits
        with model.disable_adapter():
            alone = {"__base__": model(input_ids=tokens).logits}
        for name in ("default", "other"):
            model.set_adapter(name)
            alone[name] = model(input_ids=tokens).logits
    assert not torch.allclose(alone["default"], alone["__base__"], atol=1e-3)
    assert not torch.allclose(alone["default"], alone["other"], atol=1e-3)
    expected = torch.stack([alone[name][i] for i, name in enumerate(NAMES)])
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-5)


def test_too_few_names_are_refused_even_if_their_number_divides_the_batch():
    torch.manual_seed(0)
    model = with_two_adapters(nn.Sequential(nn.Linear(6, 8)), "bottleneck", target_modules=["0"])
    with pytest.raises(ValueError, match=r"number of inputs, but got 3 and 9 respectively"):
        model(torch.randn(9, 6), adapter_names=NAMES)
