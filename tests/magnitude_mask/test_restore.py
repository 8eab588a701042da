"""The base's own numbers come back bit for bit, whatever happens."""

import copy

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from masked_models import base_tensors, layers_of, logits, same, values_of
from peft import get_peft_model
from torch import nn

from peft_xmask import MagnitudeMaskConfig
from peft_xmask.errors import BaseMismatchError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["disable", "switch", "unmerge", "delete", "unload", "merge and unload", "state dict"])
def test_every_way_back(way, dtype, masked, tiny_bert, tiny_batch):
    model = masked(dtype)
    own = base_tensors(masked(dtype))
    expected = tiny_bert().to(dtype).state_dict()
    logits(model, tiny_batch)
    assert not same(base_tensors(model), own)
    if way == "disable":
        with model.disable_adapter():
            assert same(base_tensors(model), own)
    elif way == "switch":
        model.add_adapter(
            "other", MagnitudeMaskConfig(density=0.1, target_modules=["classifier.nothing", "pooler.dense"])
        )
        model.set_adapter("other")
        assert same({name: base_tensors(model)[name] for name in own}, own)
    elif way == "unmerge":
        model.merge_adapter()
        assert not same(base_tensors(model), own)
        model.unmerge_adapter()
        assert same(base_tensors(model), own)
    elif way == "delete":
        model.delete_adapter("default")
        assert same(base_tensors(model), own)
    elif way == "unload":
        model.merge_adapter()
        plain = model.unload().state_dict()
        assert all(torch.equal(plain[name], expected[name]) for name in expected if "classifier" not in name)
    elif way == "merge and unload":
        before = base_tensors(model)
        plain = model.merge_and_unload()
        assert all(
            torch.equal(plain.get_parameter(name.removeprefix("base_model.model.")), before[name]) for name in own
        )
    else:
        state = model.state_dict()
        assert all(
            torch.equal(state[name.replace(".weight", ".base_layer.weight")], own[name])
            for name in own
            if name.endswith("weight")
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_after_an_exception_in_a_forward_pass_and_in_a_step(dtype, masked, tiny_batch):
    model, own = masked(dtype), base_tensors(masked(dtype))
    layer = list(layers_of(model).values())[5]
    broken = layer.get_base_layer().register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.train()(**tiny_batch)
    broken.remove()
    with model.disable_adapter():
        assert same(base_tensors(model), own)
    out = model(**tiny_batch).logits
    out.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        out.float().sum().backward()
    with model.disable_adapter():
        assert same(base_tensors(model), own)


def test_casting_and_moving_cast_the_base(masked, tiny_batch):
    model = masked()
    logits(model, tiny_batch)
    own = {name: each.bfloat16() for name, each in base_tensors(masked()).items()}
    model.to(torch.bfloat16)
    assert logits(model, tiny_batch).dtype == torch.bfloat16
    with model.disable_adapter():
        assert same(base_tensors(model), own)


def test_a_copy_is_independent(masked, tiny_batch):
    model, own = masked(), base_tensors(masked())
    out = logits(model, tiny_batch)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        values_of(twin).mul_(2)
    assert not torch.equal(logits(twin, tiny_batch), out)
    assert torch.equal(logits(model, tiny_batch), out)
    with twin.disable_adapter():
        assert same(base_tensors(twin), own)


def test_several_masks_add_up(masked, tiny_batch):
    model, own = masked(density=0.3, task_type=None), base_tensors(masked())
    torch.manual_seed(2)
    model.add_adapter("other", MagnitudeMaskConfig(density=0.2, selection="random", init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    logits(model, tiny_batch)
    together = base_tensors(model)
    for name, layer in layers_of(model).items():
        expected = own[f"{name}.weight"].clone().view(-1)
        for adapter in ("default", "other"):
            for change in layer.changes(adapter):
                expected[change.indices.index] += change.delta.detach()
        torch.testing.assert_close(together[f"{name}.weight"].view(-1), expected)
    with model.disable_adapter():
        assert same(base_tensors(model), own)


@pytest.mark.parametrize("through_data", [True, False])
def test_somebody_elses_change_is_not_written_over(through_data, masked, tiny_batch):
    model = masked()
    logits(model, tiny_batch)
    weight = next(iter(layers_of(model).values())).get_base_layer().weight
    with torch.no_grad():
        (weight.data if through_data else weight).add_(0.1)
    changed = weight.detach().clone()
    with pytest.raises(BaseMismatchError, match="changed while an adapter was active") as info:
        model.base_model.disable_adapter_layers()
    assert info.value.expected != info.value.found
    assert torch.equal(weight, changed)


def test_a_change_elsewhere_in_the_parameter_stays(masked, tiny_batch):
    model = masked()
    logits(model, tiny_batch)
    layer = next(iter(layers_of(model).values()))
    free = next(i for i in range(256) if i not in layer.changes("default")[0].indices.index)
    with torch.no_grad():
        layer.get_base_layer().weight.view(-1)[free] = 7.0
    with model.disable_adapter():
        assert layer.get_base_layer().weight.view(-1)[free] == 7.0


def test_a_bare_step_changes_nothing_that_is_not_served(masked, tiny_batch):
    """Values that change are written at the next forward pass; the base is whole in between."""
    model, own = masked(), base_tensors(masked())
    out = logits(model, tiny_batch)
    with model.disable_adapter(), torch.no_grad():
        values_of(model).add_(0.1)
        assert same(base_tensors(model), own)
    assert not torch.equal(logits(model, tiny_batch), out)
    values_of(model).data.zero_()  # torch does not count this one
    model.set_adapter("default")
    assert torch.equal(logits(model, tiny_batch), logits(model.unload(), tiny_batch))


class AnyOrder(RuleBasedStateMachine):
    """Calls in any order: whenever no adapter serves, the base is bit-identical to what it was.

    Adapters "a" and "c" have the same mask, "b" has another.
    """

    @initialize()
    def build(self):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)).to(torch.bfloat16)
        self.own = {name: each.clone() for name, each in base.state_dict().items()}
        self.model = get_peft_model(base, self.config("a"), adapter_name="a").eval()
        self.x = torch.randn(4, 6).bfloat16()

    @staticmethod
    def config(name):
        selection = "random" if name == "b" else "smallest"
        return MagnitudeMaskConfig(target_modules=["0", "1", "2"], density=0.4, init_weights=False, selection=selection)

    @rule()
    def forward(self):
        with torch.no_grad():
            assert self.model(self.x).isfinite().all()
        for i in range(3):
            layer = self.model.base_model.model[i]
            served = layer.merged_adapters or layer.active_adapters
            if len(served) == 1:
                for change in layer.changes(served[0]):
                    own, index = self.own[f"{i}.{change.name}"].clone().view(-1), change.indices.index
                    own[index] = (own[index].float() + change.delta).bfloat16()
                    assert torch.equal(getattr(layer, change.name).detach().view(-1), own)

    @rule()
    def step(self):
        trained = [each for each in self.model.parameters() if each.requires_grad]
        if trained and not self.model.base_model.model[0].merged:
            self.model(self.x).float().square().mean().backward()
            with torch.no_grad():
                for each in trained:
                    each.sub_(0.1 * each.grad)
                    each.grad = None

    @rule(name=st.sampled_from(["b", "c"]))
    def add(self, name):
        if name not in self.model.peft_config:
            self.model.add_adapter(name, self.config(name))

    @rule(name=st.sampled_from(["b", "c"]))
    def delete(self, name):
        if name in self.model.peft_config and not self.model.base_model.model[0].merged:
            self.model.delete_adapter(name)
            self.model.base_model.set_adapter(["a"])

    @rule(which=st.sampled_from([["a"], ["b"], ["c"], ["a", "b"], ["a", "c"]]))
    def switch(self, which):
        if set(which) <= set(self.model.peft_config):
            self.model.base_model.set_adapter(which)

    @rule()
    def merge(self):
        self.model.merge_adapter()

    @rule()
    def unmerge(self):
        self.model.unmerge_adapter()

    @rule()
    def disabled(self):
        with self.model.disable_adapter(), torch.no_grad():
            self.model(self.x)
            for i in range(3):
                layer = self.model.base_model.model[i].get_base_layer()
                assert torch.equal(layer.weight, self.own[f"{i}.weight"])
                assert torch.equal(layer.bias, self.own[f"{i}.bias"])

    def teardown(self):
        if hasattr(self, "model"):
            plain = self.model.unload()
            assert same(dict(plain.state_dict()), self.own)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
