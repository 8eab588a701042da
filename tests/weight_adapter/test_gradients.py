"""The change and its gradients are those of the formula, for every kind of module."""

import copy

import pytest
import torch
from adapted_models import formula, layers_of
from peft import get_peft_model
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from peft_xmask import WeightAdapterConfig
from peft_xmask.errors import StaleGraphError


class Kinds(nn.Module):
    """One module of each kind that can be targeted."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.linear = nn.Linear(6, 8)
        self.conv1d_of_gpt2 = Conv1D(8, 8)
        self.conv1d = nn.Conv1d(5, 5, 3, padding=1)
        self.conv2d = nn.Conv2d(5, 3, 3, padding=1)
        self.plain = nn.Linear(4, 4, bias=False)
        nn.init.normal_(self.norm.bias)
        nn.init.normal_(self.conv1d_of_gpt2.bias)

    def forward(self, x):
        x = self.conv1d_of_gpt2(torch.tanh(self.linear(self.norm(x))))
        return self.plain(self.conv2d(torch.tanh(self.conv1d(x)).unflatten(-1, (2, 4))))


ALL = ["norm", "linear", "conv1d_of_gpt2", "conv1d", "conv2d"]
X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


def build(target="both", dtype=torch.float32, **fields):
    torch.manual_seed(0)
    base = Kinds().to(dtype)
    targets = ALL if target == "bias" else [*ALL, "plain"]
    fields = {"target_modules": targets, "r": 3, "init_weights": False, "scale": 0.7, **fields}
    return get_peft_model(base, WeightAdapterConfig(target=target, **fields)).train()


def loss_of(model, x=X):
    return model(x).float().square().sum()


def by_formula(model, activation, x=X):
    """Loss and gradients of the factors, by differentiating the formula through plain modules."""
    torch.manual_seed(0)
    base = Kinds()
    own = dict(base.named_parameters())
    changed = {}
    for name, layer in layers_of(model).items():
        short = name.removeprefix("base_model.model.")
        for part in layer.weight_adapter_adapted["default"].adapted:
            numbers = own[f"{short}.{part.name}"].detach()
            changed[f"{short}.{part.name}"] = numbers + formula(layer, part.name, numbers, activation, 0.7)
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = functional_call(base, changed, (x,)).square().sum()
    return loss, dict(
        zip(
            [n for n, p in model.named_parameters() if p.requires_grad], torch.autograd.grad(loss, trained), strict=True
        )
    )


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("adapter_bias", [None, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "identity"])
@pytest.mark.parametrize("target", ["bias", "weight", "both"])
def test_gradients_are_those_of_the_formula(target, activation, adapter_bias):
    model = build(target, activation=activation, adapter_bias=adapter_bias)
    loss = loss_of(model)
    loss.backward()
    expected_loss, expected = by_formula(model, activation)
    torch.testing.assert_close(loss, expected_loss)
    assert gradients(model).keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(gradients(model)[name], grad, atol=1e-5, rtol=1e-4, msg=name)


def test_micro_batches_add_up_and_a_graph_can_be_walked_twice():
    model = build()
    whole, parts = copy.deepcopy(model), model
    loss_of(whole).backward()
    for row in X:
        loss_of(parts, row[None]).backward()
    for name, grad in gradients(whole).items():
        torch.testing.assert_close(gradients(parts)[name], grad, atol=1e-5, rtol=1e-4)
    twice = build()
    loss = loss_of(twice)
    loss.backward(retain_graph=True)
    loss.backward()
    for name, grad in gradients(whole).items():
        torch.testing.assert_close(gradients(twice)[name], 2 * grad, atol=1e-5, rtol=1e-4)


def test_the_change_is_computed_once_for_each_step(monkeypatch):
    from peft_xmask.tuners.weight_adapter.product import Product

    computed = []
    value = Product.value
    monkeypatch.setattr(Product, "value", lambda self: computed.append(self) or value(self))
    model = build()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    parts = sum(len(layer.weight_adapter_adapted["default"].adapted) for layer in layers_of(model).values())
    assert parts == 11
    for step in range(2):
        for row in X:
            loss_of(model, row[None]).backward()
        assert len(computed) == parts * (step + 1)
        optimizer.step()
        optimizer.zero_grad()


def test_no_gradient_as_large_as_a_weight_is_made():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.sizes = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for each in out if isinstance(out, (tuple, list)) else [out]:
                if (
                    isinstance(each, torch.Tensor)
                    and "view" not in str(func)
                    and each.dim()
                    and func.namespace == "aten"
                ):
                    self.sizes.append((each.untyped_storage().nbytes() // each.element_size(), str(func)))
            return out

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    model = get_peft_model(base, WeightAdapterConfig(target="weight", r=4, target_modules=["0", "2"]))
    x = torch.randn(8, 64)
    loss = model(x).sum()
    with Largest() as seen:
        loss.backward()
    made = [name for size, name in seen.sizes if size >= 64 * 64 and not name.startswith(("aten.t.", "aten.detach."))]
    assert seen.sizes
    assert made == []


def test_an_optimizers_step_between_forward_and_backward_is_refused():
    for target in ("bias", "weight"):
        model = build(target)
        loss = loss_of(model)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(0.5)
        with pytest.raises(StaleGraphError, match="Run backward before"):
            loss.backward()


@pytest.mark.parametrize("r", [1, 2, 16])
def test_no_unit_over_a_bias_starts_dead(r):
    """With a ReLU, a unit that is zero for the one vector it reads would have no gradient, ever."""
    model = build("bias", r=r, init_weights=True)
    loss_of(model).backward()
    for name, grad in gradients(model).items():
        if "_up." in name:
            assert grad.abs().sum(1).gt(0).all(), name


def test_a_bias_of_zeros_can_move():
    def trained(adapter_bias):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(6, 6))
        nn.init.zeros_(base[0].bias)
        config = WeightAdapterConfig(target_modules=["0"], r=2, adapter_bias=adapter_bias)
        model = get_peft_model(base, config)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(10):
            optimizer.zero_grad()
            (model(torch.randn(4, 6)) - 1).square().mean().backward()
            optimizer.step()
        (layer,) = layers_of(model).values()
        ((_, change),) = layer.result("default")
        return change

    assert trained(None).gt(0.1).all()
    assert not trained(False).any()


def test_dropout_is_for_training_and_the_same_for_a_whole_step():
    model = build("bias", dropout=0.5, adapter_bias=True)
    (first, second), step = (loss_of(model) for _ in range(2)), torch.no_grad()
    assert torch.equal(first, second)
    with step:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.0)
    assert not torch.equal(loss_of(model), first)
    assert torch.equal(loss_of(model.eval()), loss_of(build("bias", adapter_bias=True).eval()))
