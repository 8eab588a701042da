"""Merging linear adapters into every kind of base, and refusing to merge the others."""

import pytest
import torch
from outputs import copied_state, run, same_state

from peft_xmask.errors import MergeError, PeftXMaskError

CLOSE = dict(atol=1e-4, rtol=1e-4)


def test_merged_outputs_agree(linear_method, architecture, adapted):
    base = run(architecture.build(), architecture.batch)
    model = adapted(architecture, linear_method)
    unmerged = run(model, architecture.batch)
    model.merge_adapter(safe_merge=True)
    merged = run(model, architecture.batch)
    torch.testing.assert_close(merged, unmerged, **CLOSE)
    assert not torch.allclose(merged, base, **CLOSE)
    model.unmerge_adapter()
    assert torch.equal(run(model, architecture.batch), unmerged)
    plain = model.merge_and_unload()
    assert torch.equal(run(plain, architecture.batch), merged)
    assert plain.state_dict().keys() == architecture.build().state_dict().keys()


def test_a_merged_model_can_be_saved_and_loaded(linear_method, transformer, adapted, tmp_path):
    plain = adapted(transformer, linear_method).merge_and_unload(safe_merge=True)
    expected = run(plain, transformer.batch)
    plain.save_pretrained(tmp_path)
    assert torch.equal(run(type(plain).from_pretrained(tmp_path), transformer.batch), expected)


def test_several_adapters_merge_alone_and_together(linear_method, architecture, adapted, add):
    def build():
        model = adapted(architecture, linear_method)
        add(model, architecture, linear_method, "other")
        return model

    expected = {}
    model = build()
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = run(model, architecture.batch)
    model.base_model.set_adapter(["default", "other"])
    expected["both"] = run(model, architecture.batch)
    for name in ("default", "other"):
        merged = run(build().merge_and_unload(adapter_names=[name]), architecture.batch)
        torch.testing.assert_close(merged, expected[name], **CLOSE)
    for names in (["default", "other"], ["other", "default"]):
        merged = run(build().merge_and_unload(adapter_names=names), architecture.batch)
        torch.testing.assert_close(merged, expected["both"], **CLOSE)


def test_one_after_the_other_equals_both_at_once(linear_method, architecture, adapted, add):
    model = adapted(architecture, linear_method)
    before = copied_state(model)
    add(model, architecture, linear_method, "other")
    model.merge_adapter(adapter_names=["default", "other"])
    at_once = run(model, architecture.batch)
    model.unmerge_adapter()
    model.merge_adapter(adapter_names=["default"])
    model.merge_adapter(adapter_names=["other"])
    torch.testing.assert_close(run(model, architecture.batch), at_once, **CLOSE)
    model.unmerge_adapter()
    model.delete_adapter("other")
    assert same_state(copied_state(model), before)


def test_merging_twice_changes_nothing(linear_method, architecture, adapted):
    model = adapted(architecture, linear_method)
    model.merge_adapter()
    merged = run(model, architecture.batch)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    assert torch.equal(run(model, architecture.batch), merged)


def test_train_mode_changes_nothing(linear_method, architecture, adapted):
    merged = [
        copied_state(adapted(architecture, linear_method).train(training).merge_and_unload())
        for training in (False, True, True)
    ]
    assert same_state(merged[0], merged[1])
    assert same_state(merged[1], merged[2])


def test_safe_merge_refuses_nan_and_leaves_the_base(linear_method, architecture, adapted):
    model = adapted(architecture, linear_method)
    before = {name: tensor for name, tensor in copied_state(model).items() if not linear_method.owns(name)}
    linear_method.spoil(model)
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    after = {name: tensor for name, tensor in copied_state(model).items() if not linear_method.owns(name)}
    assert same_state(before, after)
    assert model.get_model_status().merged_adapters == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merging_in_half_precision(linear_method, architecture, dtype, adapted):
    base = architecture.build().to(dtype)
    before = copied_state(base)
    model = adapted(architecture, linear_method, base=base)
    unmerged = run(model, architecture.batch)
    model.merge_adapter(safe_merge=True)
    merged = run(model, architecture.batch)
    assert merged.dtype == dtype
    size = float(unmerged.abs().max())
    torch.testing.assert_close(merged, unmerged, rtol=0, atol=size * (0.02 if dtype == torch.float16 else 0.15))
    model.unmerge_adapter()
    assert same_state(copied_state(model.unload()), before)


def test_a_disabled_merged_adapter_is_the_base(linear_method, architecture, adapted):
    base = run(architecture.build(), architecture.batch)
    model = adapted(architecture, linear_method)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(run(model, architecture.batch), base)


def test_a_merged_adapter_is_not_deleted(linear_method, architecture, adapted, add):
    model = adapted(architecture, linear_method)
    add(model, architecture, linear_method, "other")
    model.merge_adapter(adapter_names=["default"])
    merged = run(model, architecture.batch)
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")
    assert set(model.peft_config) == {"default", "other"}
    model.delete_adapter("other")
    assert torch.equal(run(model, architecture.batch), merged)
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert not model.peft_config


def test_what_is_not_linear_refuses_to_merge(bent_method, architecture, adapted):
    model = adapted(architecture, bent_method)
    before, state = run(model, architecture.batch), copied_state(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match="is a linear map"):
            merge()
    assert issubclass(MergeError, PeftXMaskError)
    assert same_state(copied_state(model), state)
    assert torch.equal(run(model, architecture.batch), before)
