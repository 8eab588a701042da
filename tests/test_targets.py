"""The default sites of every architecture, on tiny models of the real classes."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModel

from peft_xmask import BottleneckConfig, WeightAdapterConfig, XPEFTConfig

WIDTH = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=50)
GROUPED = dict(WIDTH, num_key_value_heads=2, head_dim=8, pad_token_id=0)
T5 = dict(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=50, decoder_start_token_id=0)

ARCHITECTURES = {
    "bert": (WIDTH, "encoder.layer.{}.output.dense"),
    "roberta": (WIDTH, "encoder.layer.{}.output.dense"),
    "electra": (WIDTH, "encoder.layer.{}.output.dense"),
    "deberta-v2": (WIDTH, "encoder.layer.{}.output.dense"),
    "distilbert": (dict(dim=16, n_layers=2, n_heads=2, hidden_dim=24, vocab_size=50), "transformer.layer.{}.ffn.lin2"),
    "gpt2": (dict(n_embd=16, n_layer=2, n_head=2, vocab_size=50), "h.{}.mlp.c_proj"),
    "llama": (GROUPED, "layers.{}.mlp.down_proj"),
    "mistral": (GROUPED, "layers.{}.mlp.down_proj"),
    "qwen2": (GROUPED, "layers.{}.mlp.down_proj"),
    "qwen3": (GROUPED, "layers.{}.mlp.down_proj"),
    "gemma": (GROUPED, "layers.{}.mlp.down_proj"),
    "phi3": (GROUPED, "layers.{}.mlp.down_proj"),
    "opt": (dict(WIDTH, ffn_dim=24, word_embed_proj_dim=16), "decoder.layers.{}.fc2"),
    "gpt_neox": (WIDTH, "layers.{}.mlp.dense_4h_to_h"),
    "bloom": (dict(hidden_size=16, n_layer=2, n_head=2, vocab_size=50), "h.{}.mlp.dense_4h_to_h"),
    "vit": (dict(WIDTH, image_size=8, patch_size=4), "layers.{}.mlp.fc2"),
    "t5": (T5, "{}"),
}
T5_SITES = [
    f"{stack}.block.{block}.layer.{layer}.DenseReluDense.wo"
    for stack, layer in (("encoder", 1), ("decoder", 2))
    for block in (0, 1)
]


def inputs(name: str) -> dict[str, torch.Tensor]:
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    ids = torch.randint(1, 50, (2, 5), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "decoder_input_ids": ids} if name == "t5" else {"input_ids": ids}


@pytest.mark.parametrize(
    "config", [XPEFTConfig(num_adapters=6, bottleneck_size=4), BottleneckConfig(init_weights=False)]
)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_block_gets_one_adapter_at_its_ffn_output(name: str, config):
    from dataclasses import replace

    fields, pattern = ARCHITECTURES[name]
    torch.manual_seed(0)
    base = AutoModel.from_config(AutoConfig.for_model(name, **fields)).eval()
    with torch.no_grad():
        before = base(**inputs(name))[0]
    model = get_peft_model(base, replace(config)).eval()
    expected = T5_SITES if name == "t5" else [pattern.format(block) for block in (0, 1)]
    assert model.base_model.targeted_module_names == expected
    with torch.no_grad():
        assert not torch.equal(model(**inputs(name))[0], before)
        with model.disable_adapter():
            assert torch.equal(model(**inputs(name))[0], before)


def test_layers_to_transform_works_with_the_default_targets():
    fields, _ = ARCHITECTURES["bert"]
    base = AutoModel.from_config(AutoConfig.for_model("bert", **fields))
    model = get_peft_model(base, XPEFTConfig(num_adapters=6, bottleneck_size=4, layers_to_transform=[1]))
    assert model.base_model.targeted_module_names == ["encoder.layer.1.output.dense"]


GATES = ["gate_proj", "up_proj", "down_proj"]
FFN = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), GATES),
    "phi3": ["gate_up_proj", "down_proj"],
    "distilbert": ["lin1", "lin2"],
    "gpt2": ["c_fc", "c_proj"],
    "opt": ["fc1", "fc2"],
    "vit": ["fc1", "fc2"],
    "gpt_neox": ["dense_h_to_4h", "dense_4h_to_h"],
    "bloom": ["dense_h_to_4h", "dense_4h_to_h"],
    "t5": ["wi", "wo"],
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_block_gets_a_weight_adapter_at_every_linear_layer_of_its_ffn(name: str):
    fields, pattern = ARCHITECTURES[name]
    torch.manual_seed(0)
    base = AutoModel.from_config(AutoConfig.for_model(name, **fields)).eval()
    with torch.no_grad():
        before = base(**inputs(name))[0]
    model = get_peft_model(base, WeightAdapterConfig(target="both", r=2, init_weights=False)).eval()
    outputs = T5_SITES if name == "t5" else [pattern.format(block) for block in (0, 1)]
    if name in FFN:
        expected = {f"{site.rpartition('.')[0]}.{each}" for site in outputs for each in FFN[name]}
    else:
        expected = {each for site in outputs for each in (site, site.replace(".output.", ".intermediate."))}
    assert set(model.base_model.targeted_module_names) == expected
    with torch.no_grad():
        assert not torch.equal(model(**inputs(name))[0], before)
        with model.disable_adapter():
            assert torch.equal(model(**inputs(name))[0], before)


def test_the_gates_of_t5_are_adapted_too():
    config = AutoConfig.for_model("t5", **{**T5, "feed_forward_proj": "gated-gelu"})
    model = get_peft_model(AutoModel.from_config(config), WeightAdapterConfig(target="weight"))
    names = {name.rpartition(".")[2] for name in model.base_model.targeted_module_names}
    assert names == {"wi_0", "wi_1", "wo"}
