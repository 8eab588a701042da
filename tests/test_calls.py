"""Modules that a model does not call: an adapter there is refused or noticed, or the module is called after all."""

import contextlib
import copy
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from peft_xmask import BottleneckConfig, MagnitudeMaskConfig, WeightAdapterConfig, XPEFTConfig
from peft_xmask.errors import MergeError, PeftXMaskWarning, TargetError

METHODS = {
    "xpeft": (XPEFTConfig, {"num_adapters": 12, "bottleneck_size": 4, "scale": 10.0}),
    "bottleneck": (BottleneckConfig, {"bottleneck_size": 4, "init_weights": False, "scale": 100.0}),
    "magnitude-mask": (MagnitudeMaskConfig, {"density": 0.2, "init_weights": False}),
    "weight-adapter": (WeightAdapterConfig, {"target": "both", "init_weights": False, "adapter_bias": True}),
}


@pytest.fixture(params=METHODS)
def adapt(request):
    """Adapts modules of a base with one of the methods."""
    cls, fields = METHODS[request.param]

    def build(base, targets, **more):
        torch.manual_seed(1)
        return get_peft_model(base, cls(target_modules=targets, **fields, **more)).eval()

    return build


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.after = nn.Linear(8, 8)

    def forward(self, x):
        return self.after(self.attention(x, x, x)[0])


def test_the_projection_of_an_attention_of_torch_is_refused(adapt):
    base = Attending()
    with pytest.raises(TargetError, match=r"'attention.out_proj' is never called: nn.MultiheadAttention"):
        adapt(base, ["out_proj", "after"])
    assert type(base.after) is nn.Linear


def test_all_linear_leaves_it_out(adapt):
    model = adapt(Attending(), "all-linear")
    assert model.peft_config["default"].target_modules == {"after"}


def encoder(nested=True) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)).eval()


X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2))
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5])


def run(model, padding):
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad():
        return inner[0](X, src_key_padding_mask=padding)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
class TestTheFastPathOfTorchsEncoder:
    def test_is_not_taken_while_adapters_are_enabled(self, padding, adapt):
        model = adapt(encoder(), None)
        before = run(encoder(), padding)
        found = run(model, padding)
        assert not torch.allclose(found[0], before[0], atol=1e-3)
        with torch.enable_grad():
            inner = model.train().get_base_model()  # trained as it is served
            trained = inner[0](X, src_key_padding_mask=padding)
        torch.testing.assert_close(trained[0], found[0])

    def test_is_taken_again_when_they_are_disabled_or_gone(self, padding, adapt):
        before = run(encoder(), padding)
        model = adapt(encoder(), None)
        adapted = run(model, padding)
        with model.disable_adapter():
            assert torch.equal(run(model, padding), before)
        assert torch.equal(run(model, padding), adapted)
        twin = copy.deepcopy(model)
        assert torch.equal(run(model.unload(), padding), before)
        assert torch.equal(run(twin, padding), adapted)

    def test_is_taken_again_after_a_call_with_adapter_names(self, padding, adapt):
        before = run(encoder(), padding)
        model = adapt(encoder(), None)
        adapted = run(model, padding)
        for disabled in (False, True):  # the first call with names, and one while adapters are disabled
            with model.disable_adapter() if disabled else contextlib.nullcontext(), torch.no_grad():
                model(X, adapter_names=["default", "__base__", "default"])
            with model.disable_adapter():
                assert torch.equal(run(model, padding), before)
        twin = copy.deepcopy(model)
        for each in (model, twin):
            with torch.no_grad():
                mixed = each(X, adapter_names=["default", "__base__", "default"])
                plain = each(X)
            torch.testing.assert_close(mixed[0], plain[0])
            assert not torch.allclose(mixed[1], plain[1], atol=1e-3)
            assert torch.equal(run(each, padding), adapted)
        unloaded = model.unload()
        assert torch.equal(run(unloaded, padding), before)
        assert not any(module._forward_pre_hooks for module in unloaded.modules())

    def test_one_layer_alone_may_be_adapted(self, padding, adapt):
        base = encoder()
        model = adapt(base, ["layers.1.linear1"])
        assert not torch.allclose(run(model, padding)[0], run(encoder(), padding)[0], atol=1e-3)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("base", [encoder()[0].layers[0], encoder()[0]], ids=["layer", "encoder"])
def test_an_encoder_of_torch_may_be_the_model_itself(base, adapt):
    padding = {} if isinstance(base, nn.TransformerEncoderLayer) else {"src_key_padding_mask": PADDING}
    with torch.no_grad():
        before = base(X, **padding)
        model = adapt(copy.deepcopy(base), ["linear1", "linear2"])
        for _ in range(3):  # the first pass is special: it is watched
            assert not torch.allclose(model(X, **padding)[0], before[0], atol=1e-3)
        model(X, adapter_names=["default", "__base__", "default"])
        with model.disable_adapter():
            assert torch.allclose(model(X, **padding), before, atol=1e-5)


@pytest.mark.parametrize(
    "normed",
    [weight_norm, spectral_norm, parametrizations.weight_norm, parametrizations.spectral_norm],
    ids=["weight_norm", "spectral_norm", "parametrized weight norm", "parametrized spectral norm"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
class TestComputedWeights:
    @pytest.mark.parametrize("config", [MagnitudeMaskConfig, WeightAdapterConfig])
    def test_cannot_be_written_into(self, config, normed):
        base = nn.Sequential(nn.Linear(4, 4), normed(nn.Linear(4, 4)))
        fields = {"target": "weight"} if config is WeightAdapterConfig else {"density": 0.5}
        with pytest.raises(TargetError, match="computed from other parameters"):
            get_peft_model(base, config(target_modules=["0", "1"], **fields))
        assert type(base[0]) is nn.Linear

    def test_can_have_an_adapter_beside_them_that_is_not_merged(self, normed):
        base = nn.Sequential(normed(nn.Linear(4, 4))).eval()
        x = torch.randn(2, 4)
        before = base(x)
        fields = dict(bottleneck_size=2, init_weights=False, scale=100.0, activation="identity", use_bias=False)
        model = get_peft_model(base, BottleneckConfig(target_modules="0", insertion_form="parallel", **fields)).eval()
        assert not torch.allclose(model(x), before)
        with pytest.raises(MergeError, match="computed"):
            model.merge_adapter()


class Reading(nn.Module):
    """A module of which one child is called and another one only read."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.called(x) @ self.read.weight.T


def test_a_module_that_is_not_called_is_reported_once(adapt):
    model = adapt(nn.Sequential(Reading()), ["called", "read"])
    with pytest.warns(PeftXMaskWarning, match=r"'0.read': 1 adapted module was not called in the first forward pass"):
        model(torch.randn(2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 4))


def test_an_adapter_without_any_called_module_is_an_error(adapt):
    model = adapt(nn.Sequential(Reading()), ["read"])
    with pytest.raises(TargetError, match="no other adapted module was"):
        model(torch.randn(2, 4))
    model(torch.randn(2, 4))


class Routed(nn.Module):
    """Experts, of which each pass calls one."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.experts[1](x)


@pytest.mark.parametrize("copied", [None, copy.deepcopy])
def test_an_expert_that_no_token_reaches_is_not_missed(copied, adapt):
    model = adapt(nn.Sequential(Routed()), [f"experts.{i}" for i in range(3)])
    model = model if copied is None else copied(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 4))
    assert not any(module._forward_pre_hooks for module in model.modules() if hasattr(module, "base_layer"))


def test_a_model_that_was_unloaded_before_its_first_pass_is_not_reported(adapt):
    plain = adapt(nn.Sequential(Reading()), ["called"]).unload()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain(torch.randn(2, 4))
    assert not plain._forward_hooks
