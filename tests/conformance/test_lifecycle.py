"""Adding, deleting and unloading adapters; what other code sees of them."""

import gc
import weakref

import pytest
import torch
from outputs import copied_state, run, same_state
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer


def owners(model, adapter_name):
    """Names of modules and tensors that mention an adapter."""
    names = [name for name, _ in model.named_modules()] + list(model.state_dict())
    return [name for name in names if adapter_name in name.split(".")]


def test_delete_the_active_adapter(method, architecture, adapted, add):
    model = adapted(architecture, method)
    before, out = copied_state(model), run(model, architecture.batch)
    add(model, architecture, method, "delete_me")
    model.set_adapter("delete_me")
    run(model, architecture.batch)
    model.delete_adapter("delete_me")
    assert model.active_adapters == ["default"]
    assert owners(model, "delete_me") == []
    assert same_state(copied_state(model), before)
    assert torch.equal(run(model, architecture.batch), out)


def test_delete_an_inactive_adapter(method, architecture, adapted, add):
    model = adapted(architecture, method)
    before, out = copied_state(model), run(model, architecture.batch)
    add(model, architecture, method, "delete_me")
    model.delete_adapter("delete_me")
    assert list(model.peft_config) == model.active_adapters == ["default"]
    assert owners(model, "delete_me") == []
    assert same_state(copied_state(model), before)
    assert torch.equal(run(model, architecture.batch), out)


def test_delete_the_last_adapter(method, architecture, adapted):
    base = run(architecture.build(), architecture.batch)
    model = adapted(architecture, method)
    model.delete_adapter("default")
    assert model.active_adapters == []
    assert owners(model, "default") == []
    assert torch.equal(run(model.base_model, architecture.batch), base)
    torch.manual_seed(1)
    model.add_adapter("new", method.config(**architecture.fields))
    model.set_adapter("new")
    assert torch.equal(run(model, architecture.batch), run(adapted(architecture, method), architecture.batch))


def test_delete_an_unknown_adapter(method, architecture, adapted):
    model = adapted(architecture, method)
    with pytest.raises(ValueError, match="Adapter unknown-adapter does not exist"):
        model.delete_adapter("unknown-adapter")
    assert list(model.peft_config) == ["default"]


def test_a_name_can_be_used_again(method, architecture, adapted, add):
    model = adapted(architecture, method)
    add(model, architecture, method, "other", seed=5)
    model.set_adapter("other")
    out = run(model, architecture.batch)
    model.delete_adapter("other")
    add(model, architecture, method, "other", seed=5)
    model.set_adapter("other")
    assert torch.equal(run(model, architecture.batch), out)


def test_unload(method, architecture, adapted):
    base = architecture.build()
    before, out = copied_state(base), run(base, architecture.batch)
    model = adapted(architecture, method, base=base)
    assert not torch.allclose(run(model, architecture.batch), out)
    plain = model.unload()
    assert plain is base
    assert not any(isinstance(module, BaseTunerLayer) for module in plain.modules())
    assert not hasattr(plain, "peft_config")
    assert same_state(copied_state(plain), before)
    assert torch.equal(run(plain, architecture.batch), out)
    again = run(adapted(architecture, method, base=plain), architecture.batch)
    assert torch.equal(again, run(adapted(architecture, method), architecture.batch))


def test_widths_are_exposed(method, architecture, adapted):
    model = adapted(architecture, method)
    site = model.base_model.model.get_submodule(architecture.site)
    shape = site.get_base_layer().weight.shape
    assert {site.in_features, site.out_features} == set(shape)
    assert torch.equal(site.weight, site.get_base_layer().weight)
    assert method.prefix.rstrip("_") in repr(site)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):  # whatever else the method put into the model has them too
            assert all(hasattr(module, name) for name in ("in_features", "out_features", "weight", "bias"))


def test_a_deleted_model_is_freed(method, architecture, adapted, add):
    model = adapted(architecture, method)
    add(model, architecture, method, "other")
    run(model, architecture.batch)
    run(model, architecture.batch, adapter_names=["default", "other", "__base__"])
    watched = [weakref.ref(model), weakref.ref(model.base_model.model.get_submodule(architecture.site))]
    watched += [weakref.ref(tensor) for name, tensor in model.named_parameters() if method.owns(name)]
    del model
    gc.collect()
    assert [ref for ref in watched if ref() is not None] == []


def test_model_status(method, architecture, adapted, add):
    model = adapted(architecture, method)
    add(model, architecture, method, "other")
    status = model.get_model_status()
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.available_adapters == ["default", "other"]
    assert status.requires_grad == {"default": True, "other": False}
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert {name for layer in model.get_layer_status() for name in layer.available_adapters} >= {"default", "other"}


def test_adapters_at_different_sites(method, architecture, adapted, add):
    """Each adapter is absent from some sites: it does nothing there, active or not."""
    model = adapted(architecture, method, layers_to_transform=[0])
    first = run(model, architecture.batch)
    add(model, architecture, method, "other", layers_to_transform=[1])
    assert torch.equal(run(model, architecture.batch), first)
    model.set_adapter("other")
    second = run(model, architecture.batch)
    assert not torch.allclose(first, second)
    model.base_model.set_adapter(["default", "other"])
    both = run(model, architecture.batch)
    assert not torch.allclose(both, first)
    assert not torch.allclose(both, second)
    model.delete_adapter("default")
    assert torch.equal(run(model, architecture.batch), second)


def test_transformers_own_calls(method, transformer, adapted, tmp_path):
    """``add_adapter``, ``load_adapter``, ``set_adapter``, ``disable_adapters`` and so on of transformers itself."""
    base = run(transformer.build(), transformer.batch)
    model = adapted(transformer, method)
    method.shift(model)
    expected = run(model, transformer.batch)
    model.save_pretrained(tmp_path / "peft")

    native = transformer.build()
    report = native.load_adapter(str(tmp_path / "peft"), adapter_name="first")
    assert not report.missing_keys
    assert not report.unexpected_keys
    assert torch.equal(run(native, transformer.batch), expected)
    native.disable_adapters()
    assert torch.equal(run(native, transformer.batch), base)
    native.enable_adapters()
    assert torch.equal(run(native, transformer.batch), expected)
    torch.manual_seed(3)
    native.add_adapter(method.config(**transformer.fields), adapter_name="second")
    native.set_adapter("second")
    second = run(native, transformer.batch)
    assert not torch.allclose(second, expected)
    assert native.active_adapters() == ["second"]
    native.save_pretrained(tmp_path / "native")
    native.set_adapter("first")
    assert torch.equal(run(native, transformer.batch), expected)
    native.delete_adapter("first")
    assert owners(native, "first") == []
    loaded = PeftModel.from_pretrained(transformer.build(), tmp_path / "native")
    assert torch.equal(run(loaded, transformer.batch), second)


def test_integers_stay_integers(method, architecture, adapted, tmp_path):
    """Bytes of a loaded adapter survive every cast of the model."""
    adapted(architecture, method).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(architecture.build().to(torch.bfloat16), tmp_path)
    integers = {n: t.clone() for n, t in loaded.state_dict().items() if method.owns(n) and not t.is_floating_point()}
    assert integers or "xpeft" not in method.name
    for cast in (torch.float16, torch.bfloat16, torch.float32):
        loaded.to(cast)
        state = loaded.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in integers.items())
        assert all(state[name].dtype == tensor.dtype for name, tensor in integers.items())
