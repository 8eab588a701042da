"""Bases that are on the meta device when an adapter is added, and get their weights afterwards."""

import pytest
import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from peft import PeftModel, get_peft_model
from transformers import BertForSequenceClassification

from peft_xmask import BottleneckConfig, MagnitudeMaskConfig, WeightAdapterConfig, XPEFTConfig
from peft_xmask.errors import BaseMismatchError, TargetError

CONFIGS = {
    "xpeft": XPEFTConfig(task_type="SEQ_CLS", num_adapters=24),
    "bottleneck": BottleneckConfig(task_type="SEQ_CLS", bottleneck_size=8, init_weights=False),
}


def answers(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def on_meta(base):
    """The same architecture without weights."""
    with torch.device("meta"):
        return type(base)(base.config).eval()


def fill(model, base):
    """Give a base its weights, whatever adapters have been put around its modules."""
    state = base.state_dict()
    inside = model.get_base_model()
    for name, tensor in list(inside.named_parameters()) + list(inside.named_buffers()):
        plain = name.replace(".base_layer", "").replace(".original_module", "")
        if tensor.is_meta and "modules_to_save" not in name:
            source = state[plain] if plain in state else base.get_buffer(plain)
            set_module_tensor_to_device(inside, name, "cpu", source)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_is_loaded_into_a_base_without_weights(
    config, low_cpu_mem_usage, minilm_classifier, minilm_batch, tmp_path
):
    model = get_peft_model(minilm_classifier(), config)
    model.save_pretrained(tmp_path)
    expected = answers(model, minilm_batch)
    fingerprint = model.peft_config["default"].base_fingerprint
    loaded = PeftModel.from_pretrained(on_meta(minilm_classifier()), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    fill(loaded, minilm_classifier())
    assert torch.equal(answers(loaded, minilm_batch), expected)
    assert loaded.peft_config["default"].base_fingerprint == fingerprint


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_wrong_weights_are_found_in_the_first_pass(config, tiny_bert, tiny_batch, tmp_path):
    model = get_peft_model(tiny_bert(), config)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(on_meta(tiny_bert()), tmp_path)
    fill(loaded, tiny_bert(seed=1))
    for _ in range(2):
        with pytest.raises(BaseMismatchError):
            answers(loaded, tiny_batch)
    bare = loaded.unload()
    assert torch.isfinite(answers(bare, tiny_batch)).all()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_new_adapter_over_a_base_without_weights_records_it_later(config, tiny_bert, tiny_batch, tmp_path):
    torch.manual_seed(2)
    expected = get_peft_model(tiny_bert(), config)
    torch.manual_seed(2)
    model = get_peft_model(on_meta(tiny_bert()), config)
    assert model.peft_config["default"].base_fingerprint is None
    fill(model, tiny_bert())
    head = expected.get_base_model().classifier.modules_to_save["default"].state_dict()
    for name, tensor in head.items():
        set_module_tensor_to_device(model.get_base_model().classifier.modules_to_save["default"], name, "cpu", tensor)
    model.load_state_dict(
        {k: v for k, v in expected.state_dict().items() if "mask_table" in k or "adapter_" in k}, strict=False
    )
    assert torch.equal(answers(model, tiny_batch), answers(expected, tiny_batch))
    assert model.peft_config["default"].base_fingerprint == expected.peft_config["default"].base_fingerprint


def test_memory_without_values_leaves_the_pool_alone(tiny_bert, tiny_batch):
    model = get_peft_model(tiny_bert(), CONFIGS["xpeft"])
    expected, state = answers(model, tiny_batch), {k: v.clone() for k, v in model.state_dict().items()}
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    for name, buffer in tiny_bert().named_buffers():  # that no checkpoint holds
        model.get_base_model().get_buffer(name).copy_(buffer)
    assert torch.equal(answers(model, tiny_batch), expected)
    model.half().float()
    assert model.get_base_model().bert.encoder.layer[0].output.dense.xpeft_sites["default"].down.dtype == torch.float32


def test_methods_that_start_from_the_weights_need_them(tiny_bert):
    for config in (MagnitudeMaskConfig(density=0.01), WeightAdapterConfig(target="weight")):
        with pytest.raises(TargetError, match="on the meta device"):
            get_peft_model(on_meta(tiny_bert()), config)
        with pytest.raises(TargetError, match="on the meta device"), init_empty_weights():
            get_peft_model(BertForSequenceClassification(tiny_bert().config), config)
