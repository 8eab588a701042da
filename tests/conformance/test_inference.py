"""Mixed batches, generation, half precision, several active adapters, disabled adapters."""

import copy

import pytest
import torch
from outputs import first_scores, run
from torch import nn

NAMES = ["__base__", "default", "other"]
CLOSE = dict(atol=1e-4, rtol=1e-4)


@pytest.fixture
def two_adapters(adapted, add):
    """A model with adapters 'default', active, and 'other'."""

    def build(architecture, method, **fields):
        model = adapted(architecture, method, **fields)
        add(model, architecture, method, "other", **fields)
        return model

    return build


def one_by_one(model, call):
    """What ``call`` gives for the base and each adapter alone, by name."""
    with model.disable_adapter():
        alone = {"__base__": call()}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = call()
    model.set_adapter("default")
    return alone


def test_a_mixed_batch(method, architecture, two_adapters):
    model = two_adapters(architecture, method)
    alone = one_by_one(model, lambda: run(model, architecture.batch))
    for names in (NAMES, NAMES[::-1], ["other", "other", "default"]):
        mixed = run(model, architecture.batch, adapter_names=names)
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], alone[name][row], **CLOSE)
    assert torch.equal(run(model, architecture.batch), alone["default"])
    with model.disable_adapter():  # goes before adapter_names
        assert torch.equal(run(model, architecture.batch, adapter_names=NAMES), alone["__base__"])


def test_a_mixed_batch_over_adapters_at_different_sites(method, architecture, adapted, add):
    model = adapted(architecture, method, layers_to_transform=[0])
    add(model, architecture, method, "other", layers_to_transform=[1])
    alone = one_by_one(model, lambda: run(model, architecture.batch))
    mixed = run(model, architecture.batch, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(mixed[row], alone[name][row], **CLOSE)


def test_mixed_batches_that_cannot_be(method, architecture, two_adapters):
    model = two_adapters(architecture, method)
    with pytest.raises(ValueError, match="nobody"):
        run(model, architecture.batch, adapter_names=["nobody"] * 3)
    with pytest.raises(ValueError, match="same as the number of inputs"):
        run(model, architecture.batch, adapter_names=["default"])
    with pytest.raises(ValueError, match="training mode"):
        run(model.train(), architecture.batch, adapter_names=NAMES)


def test_a_mixed_batch_is_refused_while_merged(linear_method, architecture, two_adapters):
    model = two_adapters(architecture, linear_method)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        run(model, architecture.batch, adapter_names=NAMES)


def test_generating_from_a_mixed_batch(method, generator, two_adapters):
    model = two_adapters(generator, method)
    alone = one_by_one(model, lambda: first_scores(model, generator.prompt))
    mixed = first_scores(model, generator.prompt, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(mixed[row], alone[name][row], **CLOSE)


def test_generating_from_a_mixed_batch_with_beams(method, generator, two_adapters):
    model = two_adapters(generator, method)
    options = dict(num_beams=3, min_new_tokens=5, max_new_tokens=5)
    alone = one_by_one(model, lambda: model.generate(**generator.prompt, **options))
    mixed = model.generate(**generator.prompt, **options, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        assert torch.equal(mixed[row], alone[name][row]), name


def test_generate_takes_positional_arguments(method, generator, adapted):
    model = adapted(generator, method)
    options = dict(max_new_tokens=3, do_sample=False)
    if generator.fields["task_type"] == "SEQ_2_SEQ_LM":
        with pytest.raises(TypeError, match="positional"):  # PEFT's generate of this task takes none
            model.generate(generator.prompt["input_ids"])
        return
    by_place = model.generate(generator.prompt["input_ids"], **options)
    assert torch.equal(by_place, model.generate(input_ids=generator.prompt["input_ids"], **options))


def test_generate_with_and_without_cache(method, generator, adapted):
    model = adapted(generator, method)
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    made = [model.generate(**generator.prompt, **options, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*made)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_generate_in_half_precision(method, generator, dtype, adapted):
    model = adapted(generator, method, base=generator.build().to(dtype))
    assert first_scores(model, generator.prompt).isfinite().any(-1).all()


def test_inputs_embeds(method, transformer, adapted):
    model = adapted(transformer, method, adapter_name="test-adapter")
    batch = dict(transformer.batch)
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    torch.testing.assert_close(run(model, {**batch, "inputs_embeds": embeds}), run(model, transformer.batch), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_a_base_in_half_precision(method, architecture, dtype, autocast_adapter_dtype, two_adapters, tmp_path):
    """Trainable parameters are float32 unless PEFT is told to keep their dtype; outputs have the base's dtype."""
    from peft import PeftModel, get_peft_model

    torch.manual_seed(1)
    config = method.config(**architecture.fields)
    model = get_peft_model(architecture.build().to(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype).eval()
    out = run(model, architecture.batch)
    assert out.dtype == dtype
    assert out.isfinite().all()
    trained = {parameter.dtype for name, parameter in model.named_parameters() if method.owns(name)}
    assert trained == {torch.float32 if autocast_adapter_dtype else dtype}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        architecture.build().to(dtype), tmp_path, autocast_adapter_dtype=autocast_adapter_dtype
    )
    assert torch.equal(run(loaded, architecture.batch), out)
    loaded.load_adapter(tmp_path, "again", autocast_adapter_dtype=autocast_adapter_dtype)
    loaded.set_adapter("again")
    assert torch.equal(run(loaded, architecture.batch), out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(method, architecture, dtype, adapted):
    model = adapted(architecture, method)
    expected = run(model, architecture.batch)
    with torch.autocast("cpu", dtype=dtype):
        out = run(model, architecture.batch)
    assert out.isfinite().all()
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.1 * float(expected.abs().max()))
    assert torch.equal(run(model, architecture.batch), expected)


def test_a_base_in_half_precision_under_autocast(method, architecture, adapted):
    model = adapted(architecture, method, base=architecture.build().to(torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(model, architecture.batch).isfinite().all()


def test_a_whole_model_is_cast(method, architecture, adapted):
    model = adapted(architecture, method)
    expected = run(model, architecture.batch)
    for dtype in (torch.bfloat16, torch.float64):
        twin = copy.deepcopy(model).to(dtype)
        out = run(twin, architecture.batch)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.15 * float(expected.abs().max()))


def test_several_active_adapters(method, architecture, two_adapters):
    """At each site every active adapter reads the module alone, so their order is of no account."""
    model = two_adapters(architecture, method)
    alone = one_by_one(model, lambda: run(model, architecture.batch))
    together = []
    for names in (["default", "other"], ["other", "default"]):
        model.base_model.set_adapter(names)
        assert model.active_adapters == names
        together.append(run(model, architecture.batch))
    torch.testing.assert_close(*together, **CLOSE)
    assert not any(torch.allclose(together[0], out, **CLOSE) for out in alone.values())
    site = model.base_model.model.get_submodule(architecture.site)
    x = torch.randn(3, site.in_features)
    with torch.no_grad():
        with model.disable_adapter():  # an adapter may sit in the base layer itself
            plain = site.get_base_layer()(x)
        both = site(x)
        for name in ("default", "other"):
            model.base_model.set_adapter(name)
            both = both - (site(x) - plain)
    torch.testing.assert_close(both, plain, **CLOSE)


def test_a_disabled_adapter_is_the_base(method, architecture, two_adapters):
    base = run(architecture.build(), architecture.batch)
    model = two_adapters(architecture, method)
    expected = run(model, architecture.batch)
    assert not torch.allclose(expected, base, **CLOSE)
    with model.disable_adapter():
        assert torch.equal(run(model, architecture.batch), base)
        with model.disable_adapter():
            assert torch.equal(run(model, architecture.batch), base)
        assert torch.equal(run(model, architecture.batch), base)
    assert torch.equal(run(model, architecture.batch), expected)
    model.base_model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    assert torch.equal(run(model, architecture.batch), base)  # it was disabled before, so it stays so
    model.base_model.enable_adapter_layers()
    assert torch.equal(run(model, architecture.batch), expected)


def test_disabling_an_irregular_state(method, architecture, adapted):
    """One site is disabled and the others are not: PEFT warns, and the base is what runs."""
    base = run(architecture.build(), architecture.batch)
    model = adapted(architecture, method)
    model.base_model.model.get_submodule(architecture.site).enable_adapters(False)
    with pytest.warns(UserWarning, match="some adapter layers that are enabled and others"), model.disable_adapter():
        assert torch.equal(run(model, architecture.batch), base)


def test_inference_mode_and_no_grad_agree(method, architecture, adapted):
    model = adapted(architecture, method)
    with torch.inference_mode():
        out = run(model, architecture.batch)
    assert torch.equal(out.clone(), run(model, architecture.batch))
    assert not isinstance(out, nn.Parameter)
