"""What is in ``peft.helpers``, and PEFT's hot-swapping, with our methods."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import (
    check_if_peft_model,
    disable_input_dtype_casting,
    rescale_adapter_scale,
    update_signature,
)
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from peft_xmask import BottleneckConfig, MagnitudeMaskConfig, WeightAdapterConfig, XPEFTConfig, as_base

CONFIGS = {
    "xpeft": XPEFTConfig(task_type="SEQ_CLS", num_adapters=24),
    "bottleneck": BottleneckConfig(task_type="SEQ_CLS", bottleneck_size=8, init_weights=False),
    "magnitude mask": MagnitudeMaskConfig(task_type="SEQ_CLS", density=0.01),
    "weight adapter": WeightAdapterConfig(task_type="SEQ_CLS"),
}


@pytest.fixture(params=CONFIGS)
def model(request, tiny_bert):
    return get_peft_model(tiny_bert(), CONFIGS[request.param])


def answers(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def test_a_saved_adapter_is_recognised(model, tmp_path):
    model.save_pretrained(tmp_path / "adapter")
    assert check_if_peft_model(str(tmp_path / "adapter"))
    assert not check_if_peft_model(str(tmp_path / "nothing"))


def test_signatures_become_those_of_the_base(model, tiny_bert, tiny_batch):
    config = replace(next(iter(model.peft_config.values())), task_type=None, modules_to_save=None, classifier=None)
    config.allow_any_base()
    plain = get_peft_model(tiny_bert(), config)  # without a task, forward has *args and **kwargs
    expected = answers(plain, tiny_batch)
    update_signature(plain, method="forward")
    assert "input_ids" in plain.forward.__annotations__
    assert torch.equal(answers(plain, tiny_batch), expected)


def test_input_casting_can_be_switched_off_and_comes_back(model, tiny_batch):
    before = answers(model, tiny_batch)
    with disable_input_dtype_casting(model):
        assert torch.equal(answers(model, tiny_batch), before)  # there is nothing to cast
    assert torch.equal(answers(model, tiny_batch), before)


def test_without_input_casting_activations_meet_weights_of_another_dtype(tiny_bert, tiny_batch):
    model = get_peft_model(tiny_bert().to(torch.bfloat16), CONFIGS["bottleneck"])
    before = answers(model, tiny_batch)
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="same dtype"):
        answers(model, tiny_batch)
    assert torch.equal(answers(model, tiny_batch), before)


def test_rescaling_is_refused_and_beneath_reaches_the_lora_alone(model, tiny_bert, tiny_batch):
    before = answers(model, tiny_batch)
    with (
        pytest.raises(ValueError, match="only supported for models with `LoraLayer`s"),
        rescale_adapter_scale(model, 2),
    ):
        pass
    assert torch.equal(answers(model, tiny_batch), before)

    lora = get_peft_model(
        tiny_bert(), LoraConfig(init_lora_weights=False, target_modules=["query"]), adapter_name="task"
    )
    over = get_peft_model(as_base(lora), XPEFTConfig(num_adapters=24))
    both = answers(over, tiny_batch)
    with rescale_adapter_scale(over, 0.0):
        scaled_away = answers(over, tiny_batch)
    over.set_lora([])
    assert torch.allclose(answers(over, tiny_batch), scaled_away, atol=1e-6)
    over.set_lora("task")
    assert torch.equal(answers(over, tiny_batch), both)


def test_hot_swapping_is_refused_before_anything_changes(model, tiny_batch, tmp_path):
    model.save_pretrained(tmp_path)
    before, state = answers(model, tiny_batch), {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(ValueError, match="Hotswapping only supports"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device="cpu")
    with pytest.raises(ValueError, match="No adapter layers found"):
        prepare_model_for_compiled_hotswap(model)
    assert torch.equal(answers(model, tiny_batch), before)
    assert all(torch.equal(each, state[name]) for name, each in model.state_dict().items())


def test_transformers_refuses_to_hot_swap_too(model, tiny_bert, tiny_batch, tmp_path):
    model.save_pretrained(tmp_path)
    native = tiny_bert()
    native.load_adapter(str(tmp_path), adapter_name="default")
    before = answers(native, tiny_batch)
    with pytest.raises(ValueError, match="only supported for LoRA"):
        native.load_adapter(str(tmp_path), adapter_name="default", hotswap=True)
    assert torch.equal(answers(native, tiny_batch), before)


def test_what_does_the_same_as_a_hot_swap(model, tiny_bert, tiny_batch, tmp_path):
    """Load under another name, choose it, delete the first."""
    model.save_pretrained(tmp_path)
    served = PeftModel.from_pretrained(tiny_bert(), tmp_path)
    expected = answers(served, tiny_batch)
    served.load_adapter(tmp_path, adapter_name="next")
    served.set_adapter("next")
    served.delete_adapter("default")
    assert torch.equal(answers(served, tiny_batch), expected)
