"""Profiles of one mask are switched in all layers at once; everything is as if each layer had been written alone."""

import copy
import pickle

import pytest
import torch
from masked_models import base_tensors, layers_of, logits, same, values_of
from peft import get_peft_model
from torch import nn

from peft_xmask import MagnitudeMaskConfig
from peft_xmask.errors import BaseMismatchError


@pytest.fixture
def two(masked, tiny_batch):
    """Builds a model with two profiles of one mask, and what it gives with each alone."""

    def build(dtype=torch.float32, **fields):
        model = masked(dtype, task_type=None, **fields)
        torch.manual_seed(2)
        model.add_adapter("other", MagnitudeMaskConfig(**{"density": 0.1, "init_weights": False, **fields}))
        expected = {}
        for name in ("default", "other"):
            alone = masked(dtype, task_type=None, **fields)
            with torch.no_grad():
                values_of(alone).copy_(values_of(model, name))
            expected[name] = logits(alone, tiny_batch)
        assert not torch.equal(expected["default"], expected["other"])
        return model, expected

    return build


@pytest.mark.parametrize("fields", [{}, {"storage_dtype": "bfloat16"}, {"include_bias": True}], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_back_and_forth(dtype, fields, two, masked, tiny_batch):
    model, expected = two(dtype, **fields)
    own = base_tensors(masked(dtype))
    for name in ("default", "other", "default", "other", "other"):
        model.set_adapter(name)
        assert torch.equal(logits(model, tiny_batch), expected[name])
    with torch.no_grad():
        values_of(model, "other").copy_(values_of(model))  # values that change are served too
    assert torch.equal(logits(model, tiny_batch), expected["default"])
    with model.disable_adapter():
        assert same(base_tensors(model), own)
    assert same(dict(model.unload().state_dict()), dict(masked(dtype).unload().state_dict()))


def test_one_layer_brings_all_in_line(two, tiny_batch):
    model, _ = two()
    logits(model, tiny_batch)
    model.set_adapter("other")
    first, *_, last = layers_of(model).values()
    before = last.get_base_layer().weight.detach().clone()
    with torch.no_grad():
        first(torch.zeros(1, first.in_features))
    assert not torch.equal(last.get_base_layer().weight, before)
    now = base_tensors(model)
    logits(model, tiny_batch)
    assert same(base_tensors(model), now)


def test_a_layer_may_be_set_alone(two, tiny_batch):
    model, expected = two()
    logits(model, tiny_batch)
    model.set_adapter("other")
    layer = list(layers_of(model).values())[3]
    layer.set_adapter("default")
    mixed = logits(model, tiny_batch)
    assert not torch.equal(mixed, expected["default"])
    assert not torch.equal(mixed, expected["other"])
    (change,) = layer.changes("default")
    served = layer.get_base_layer().weight.detach().view(-1)[change.indices.index].clone()
    model.set_adapter("default")
    assert torch.equal(logits(model, tiny_batch), expected["default"])
    assert torch.equal(layer.get_base_layer().weight.view(-1)[change.indices.index], served)


def test_somebody_elses_change_stops_the_switch_before_it_begins(two, tiny_batch):
    model, _ = two()
    logits(model, tiny_batch)
    *_, last = layers_of(model).values()
    with torch.no_grad():
        last.get_base_layer().weight.add_(0.1)
    before = base_tensors(model)
    model.set_adapter("other")
    with pytest.raises(BaseMismatchError, match="changed while an adapter was active"):
        logits(model, tiny_batch)
    assert same(base_tensors(model), before)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_switches_on_its_own(copied, two, tiny_batch):
    model, expected = two()
    for name in ("default", "other"):
        model.set_adapter(name)
        logits(model, tiny_batch)
    twin = copied(model)
    for name in ("default", "other", "default"):
        twin.set_adapter(name)
        assert torch.equal(logits(twin, tiny_batch), expected[name])
        assert torch.equal(logits(model, tiny_batch), expected["other"])


def test_after_a_cast(two, tiny_batch):
    model, _ = two()
    for name in ("default", "other"):
        model.set_adapter(name)
        logits(model, tiny_batch)
    model.to(torch.bfloat16)
    expected, found = two(torch.bfloat16)[1], {}
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        found[name] = logits(model, tiny_batch)
        torch.testing.assert_close(found[name], expected[name], atol=0.05, rtol=0.05)
    assert not torch.equal(found["default"], found["other"])


def test_masks_of_other_modules_do_not_mix():
    """Equal shapes and a random mask of one seed: the same places in another module."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    own = copy.deepcopy(base)
    fields = dict(density=0.3, selection="random", init_weights=False)
    model = get_peft_model(base, MagnitudeMaskConfig(target_modules=["0"], **fields))
    model.add_adapter("other", MagnitudeMaskConfig(target_modules=["1"], **fields))
    x = torch.randn(2, 8)
    for name, index in (("default", 0), ("other", 1), ("default", 0)):
        model.set_adapter(name)
        with torch.no_grad():
            model(x)
        changed = [not torch.equal(base[i].get_base_layer().weight, own[i].weight) for i in range(2)]
        assert changed == [i == index for i in range(2)]
