"""Saving, loading and state dicts."""

import pytest
import torch
from outputs import copied_state, run, same_state
from peft import (
    PeftConfig,
    PeftModel,
    get_base_model_state_dict,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file

FILE = "adapter_model.safetensors"


def test_it_has_what_peft_models_have(method, architecture, adapted):
    model = adapted(architecture, method, adapter_name="test-adapter")
    assert all(hasattr(model, name) for name in ("save_pretrained", "from_pretrained", "push_to_hub"))
    named = [name for name, _ in model.named_parameters() if ".test-adapter." in name]
    assert named
    assert all(method.owns(name) for name in named)


def test_save_and_load(method, architecture, adapted, tmp_path):
    model = adapted(architecture, method)
    method.shift(model)
    expected = run(model, architecture.batch)
    assert not torch.allclose(expected, run(architecture.build(), architecture.batch))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {FILE, "adapter_config.json", "README.md"}
    assert all(method.owns(key) for key in load_file(tmp_path / FILE))
    loaded = PeftModel.from_pretrained(architecture.build(), tmp_path)
    assert torch.equal(run(loaded, architecture.batch), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / FILE).read_bytes()


def test_loading_with_low_memory(method, architecture, adapted, tmp_path):
    model = adapted(architecture, method)
    method.shift(model)
    expected = run(model, architecture.batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(architecture.build(), tmp_path, low_cpu_mem_usage=True)
    loaded.load_adapter(tmp_path, adapter_name="other", low_cpu_mem_usage=True)
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    for name in ("default", "other"):
        loaded.set_adapter(name)
        assert torch.equal(run(loaded, architecture.batch), expected)
    lean = inject_adapter_in_model(method.config(**architecture.fields), architecture.build(), low_cpu_mem_usage=True)
    assert any(parameter.is_meta for name, parameter in lean.named_parameters() if method.owns(name))


def test_an_adapter_loaded_for_training_has_the_parameters_of_the_one_saved(method, architecture, adapted, tmp_path):
    """PEFT's suites ask this of adapters loaded for inference, which some methods ship in another form."""
    model = adapted(architecture, method)
    method.shift(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(architecture.build(), tmp_path, is_trainable=True)
    names, found = (
        {name: each.shape for name, each in m.named_parameters() if each.requires_grad} for m in (model, again)
    )
    assert names
    assert found == names
    assert again.state_dict().keys() == model.state_dict().keys()


def test_several_adapters_are_saved_apart(method, architecture, adapted, add, tmp_path):
    model = adapted(architecture, method)
    add(model, architecture, method, "other")
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = run(model, architecture.batch)
    assert not torch.allclose(expected["default"], expected["other"])
    model.save_pretrained(tmp_path / "both")
    loaded = PeftModel.from_pretrained(architecture.build(), tmp_path / "both")
    result = loaded.load_adapter(tmp_path / "both" / "other", adapter_name="other")
    assert result.missing_keys == []
    for name, out in expected.items():
        loaded.set_adapter(name)
        assert torch.equal(run(loaded, architecture.batch), out)
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert not (tmp_path / "one" / FILE).exists()
    assert (tmp_path / "one" / "other" / FILE).read_bytes() == (tmp_path / "both" / "other" / FILE).read_bytes()


def test_adapter_names_that_contain_each_other(method, architecture, adapted, add, tmp_path):
    model = adapted(architecture, method)
    alone = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    for seed, name in enumerate(("default2", "other_default", "foodefault_bar", "efaul")):
        add(model, architecture, method, name, seed=seed)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert same_state(load_file(tmp_path / FILE), alone)


def test_config_round_trip(method, architecture, adapted, tmp_path):
    model = adapted(architecture, method)
    model.save_pretrained(tmp_path)
    saved = model.peft_config["default"]
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is type(saved)
    set_by_saving = ("inference_mode", "auto_mapping")
    read, kept = ({k: v for k, v in each.to_dict().items() if k not in set_by_saving} for each in (config, saved))
    assert read == kept
    loaded = PeftModel.from_pretrained(architecture.build(), tmp_path, config=config)
    assert loaded.peft_config["default"].to_dict() == config.to_dict()  # a copy: the user's config is never changed
    assert config.inference_mode


def test_state_dict_round_trip(method, architecture, adapted):
    model = adapted(architecture, method)
    method.shift(model)
    state = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    twin = adapted(architecture, method)
    assert not torch.equal(run(twin, architecture.batch), run(model, architecture.batch))
    assert set_peft_model_state_dict(twin, state).unexpected_keys == []
    assert torch.equal(run(twin, architecture.batch), run(model, architecture.batch))


def test_direct_injection(method, architecture):
    def injected(seed):
        base = architecture.build()
        torch.manual_seed(seed)
        return inject_adapter_in_model(method.config(**architecture.fields), base).eval()

    first, second = injected(1), injected(2)
    assert not torch.equal(run(first, architecture.batch), run(second, architecture.batch))
    assert set_peft_model_state_dict(second, get_peft_model_state_dict(first)).unexpected_keys == []
    assert torch.equal(run(first, architecture.batch), run(second, architecture.batch))


def test_base_model_state_dict(method, architecture, adapted):
    before = copied_state(architecture.build())
    model = adapted(architecture, method)
    assert same_state(get_base_model_state_dict(model), before)
    with torch.no_grad():
        for parameter in model.get_base_model().parameters():
            parameter.add_(0.1)
    result = set_base_model_state_dict(model, before, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert same_state(get_base_model_state_dict(model), before)


def test_device_map(method, architecture, adapted, tmp_path):
    model = adapted(architecture, method)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(architecture.build(), tmp_path, device_map={"": "cpu"})
    assert torch.equal(run(loaded, architecture.batch), run(model, architecture.batch))


def test_loading_under_a_name_that_is_taken(method, architecture, adapted, tmp_path):
    model = adapted(architecture, method)
    expected = run(model, architecture.batch)
    model.save_pretrained(tmp_path)
    method.shift(model)
    model.load_adapter(tmp_path, adapter_name="default")
    assert torch.equal(run(model, architecture.batch), expected)
    before = set(model.peft_config)
    with pytest.raises(ValueError, match="already"):
        model.add_adapter("default", method.config(**architecture.fields))
    assert set(model.peft_config) == before
