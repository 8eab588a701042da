"""What training changes, and what it never does."""

import pytest
import torch
from outputs import copied_state, first_tensor, run
from peft import PeftModel, prepare_model_for_kbit_training


def train(model, batch, steps=2, rate=0.01):
    """A few steps of SGD; returns the gradients of the last one, by parameter name."""
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        first_tensor(model(**batch)).square().mean().backward()
        optimizer.step()
    model.eval()
    return {name: p.grad for name, p in model.named_parameters()}


def test_only_the_adapter_is_trained(method, architecture, adapted):
    model = adapted(architecture, method)
    before, out = copied_state(model), run(model, architecture.batch)
    gradients = train(model, architecture.batch, rate=0.1)
    after = copied_state(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(method.owns(name) for name in changed)
    for name, gradient in gradients.items():
        assert (gradient is not None) == method.owns(name), name
        assert gradient is None or gradient.isfinite().all()
    assert any(gradient is not None and gradient.any() for gradient in gradients.values())
    assert run(model, architecture.batch).shape == out.shape


def test_only_the_active_adapter_is_trained(method, architecture, adapted, add):
    model = adapted(architecture, method)
    add(model, architecture, method, "other")
    model.set_adapter("other")
    before = copied_state(model)
    train(model, architecture.batch, rate=0.1)
    after = copied_state(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".other." in name for name in changed)


def test_a_trained_adapter_is_saved_as_it_evaluates(method, architecture, adapted, tmp_path):
    model = adapted(architecture, method)
    train(model, architecture.batch, rate=0.1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(architecture.build(), tmp_path)
    assert torch.equal(run(loaded, architecture.batch), run(model, architecture.batch))


def test_layers_to_transform(method, architecture, adapted, tmp_path):
    def numbers(model):
        return sum(p.numel() for name, p in model.named_parameters() if method.owns(name))

    model = adapted(architecture, method, layers_to_transform=[0])
    gradients = train(model, architecture.batch)
    assert all((gradient is not None) == method.owns(name) for name, gradient in gradients.items())
    assert 2 * numbers(model) == numbers(adapted(architecture, method))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(architecture.build(), tmp_path)
    assert torch.equal(run(loaded, architecture.batch), run(model, architecture.batch))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(method, architecture, use_reentrant, adapted):
    if not architecture.checkpoints:
        pytest.skip("a plain module checkpoints nothing by itself")
    plain = train(adapted(architecture, method), architecture.batch, steps=1)
    model = adapted(architecture, method)
    model.prepare_model_for_gradient_checkpointing(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed = train(model, architecture.batch, steps=1)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert (gradient is None) == (checkpointed[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(checkpointed[name], gradient)


def test_prepared_for_training(method, transformer, adapted):
    tokens = transformer.batch["input_ids"]
    model = adapted(transformer, method)
    assert not model.get_input_embeddings()(tokens).requires_grad
    model = adapted(transformer, method, base=prepare_model_for_kbit_training(transformer.build()))
    assert {method.owns(name) for name, p in model.named_parameters() if p.requires_grad} == {True}
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(tokens).requires_grad


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_requires_grad_follows_the_active_adapter(method, architecture, adapted, add):
    model = adapted(architecture, method)
    default = trainable(model)
    assert default == {name for name, _ in model.named_parameters() if method.owns(name)}
    add(model, architecture, method, "other")
    assert trainable(model) == default
    model.set_adapter("other")
    other = trainable(model)
    assert other == {name.replace(".default.", ".other.") for name in default}
    model.base_model.set_adapter(["default", "other"])
    assert trainable(model) == default | other
    model.set_requires_grad("default", requires_grad=False)
    assert trainable(model) == other
    model.set_adapter("default")
    with model.disable_adapter():
        assert trainable(model) == set()
    assert trainable(model) == default
    model.set_adapter("default", inference_mode=True)
    assert trainable(model) == set()


@pytest.mark.parametrize("is_trainable", [True, False])
def test_requires_grad_of_loaded_adapters(method, architecture, is_trainable, adapted, tmp_path):
    model = adapted(architecture, method)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(architecture.build(), tmp_path, is_trainable=is_trainable)
    expected = trainable(model) if is_trainable else set()
    others = {name.replace(".default.", ".other.") for name in expected}
    assert trainable(loaded) == expected
    loaded.load_adapter(tmp_path, "other", is_trainable=is_trainable)  # not active, but as trainable as it was asked
    assert trainable(loaded) == expected | others
    loaded.set_adapter("other", inference_mode=not is_trainable)
    assert trainable(loaded) == others
    assert torch.equal(run(loaded, architecture.batch), run(model, architecture.batch))


def test_training_under_bf16_autocast(method, architecture, adapted):
    model = adapted(architecture, method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients = train(model, architecture.batch)
    owned = [gradient for name, gradient in gradients.items() if method.owns(name)]
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in owned)
    assert any(gradient.any() for gradient in owned)


def test_training_on_a_bf16_base(method, architecture, adapted):
    model = adapted(architecture, method, base=architecture.build().to(torch.bfloat16))
    gradients = train(model, architecture.batch)
    assert all(gradient.isfinite().all() for name, gradient in gradients.items() if method.owns(name))
