"""describe() of real models: stock and ours, several adapters, mixed models, heads."""

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from recipes import build, build_base, config_of
from transformers import BertConfig, BertForSequenceClassification

from peft_xmask import BottleneckConfig
from peft_xmask.errors import ConfigError
from peft_xmask.reference import describe


def facts(model, index=0):
    return describe(model).adapters[index]


@pytest.mark.parametrize(
    "method", ["LORA", "IA3", "PREFIX_TUNING", "XPEFT", "MAGNITUDE_MASK", "VERA", "SHADOW", "XLORA"]
)
def test_what_is_counted_is_what_the_formula_says(method):
    adapter = facts(build(method))
    assert adapter.card.method == method
    assert adapter.active
    assert adapter.trainable_parameters == adapter.formula_parameters > 0
    assert adapter.stored_bytes == adapter.formula_bytes


def test_several_adapters_each_have_their_own_figures():
    model = build("LORA")
    model.add_adapter("other", config_of("LORA", "llama", r=2, target_modules=["down_proj"]))
    first, second = describe(model).adapters
    assert (first.name, second.name) == ("default", "other")
    assert first.sites == {"attention Q": 2, "attention V": 2}
    assert second.sites == {"FFN output": 2}
    assert second.formula_parameters == 2 * 2 * (24 + 16)
    assert second.stored_bytes == 4 * second.formula_parameters
    assert second.trainable_parameters is None
    model.set_adapter("other")
    assert describe(model).adapters[1].trainable_parameters == second.formula_parameters


def test_a_mixed_model_has_adapters_of_two_methods():
    model = get_peft_model(build_base("llama"), LoraConfig(r=3, target_modules=["q_proj"]), mixed=True)
    model.add_adapter("other", LoHaConfig(r=2, target_modules=["v_proj"]))
    first, second = describe(model).adapters
    assert (first.card.method, second.card.method) == ("LORA", "LOHA")
    assert first.formula_parameters == 2 * 3 * 32
    assert second.formula_parameters == 2 * 2 * 2 * 24


def test_layers_to_transform_show_in_the_blocks_touched():
    model = get_peft_model(build_base("bert"), BottleneckConfig(bottleneck_size=4, layers_to_transform=[1]))
    assert facts(model).layers == (1, 2)


def test_a_head_is_not_counted_as_the_method():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    model = get_peft_model(BertForSequenceClassification(config), IA3Config(task_type="SEQ_CLS"))
    adapter = facts(model)
    assert adapter.trainable_parameters == adapter.formula_parameters
    assert adapter.stored_bytes == adapter.formula_bytes


def test_a_loaded_adapter_trains_nothing(tmp_path):
    build("BOTTLENECK_ADAPTER").save_pretrained(tmp_path)
    adapter = facts(PeftModel.from_pretrained(build_base("llama"), tmp_path))
    assert adapter.trainable_parameters is None
    assert adapter.stored_bytes == adapter.formula_bytes


def test_the_table_names_every_adapter_and_property():
    text = describe(build("XPEFT")).to_markdown()
    assert "| property | `default` |" in text
    assert "| insertion form | sequential |" in text
    assert "50 = num_profiles*(learn_gain + 2*num_adapters) per site" in text


def test_describing_changes_nothing():
    model = build("LORA")
    model.add_adapter("other", config_of("LORA", "llama"))
    before = {name: (parameter.requires_grad, parameter.clone()) for name, parameter in model.named_parameters()}
    describe(model)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert model.active_adapter == "default"


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ConfigError, match="found a BertModel without any"):
        describe(build_base("bert"))
