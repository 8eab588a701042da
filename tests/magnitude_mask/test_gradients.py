"""Gradients of masked values are those of the parameters they are in, and nothing more is kept."""

import copy

import pytest
import torch
from masked_models import base_tensors, layers_of, logits, same, values_of
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_xmask import MagnitudeMaskConfig
from peft_xmask.errors import StaleGraphError
from peft_xmask.tuners.in_place.flat_indices import FlatIndices
from peft_xmask.tuners.in_place.sparse_gradients import product_at


class Kinds(nn.Module):
    """One module of each kind that can be targeted."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 6, padding_idx=0)
        self.norm = nn.LayerNorm(6)
        self.linear = nn.Linear(6, 8)
        self.conv1d_of_gpt2 = Conv1D(8, 8)
        self.conv1d = nn.Conv1d(5, 5, 3, padding=1)
        self.conv2d = nn.Conv2d(5, 3, 3, padding=1)

    def forward(self, tokens):
        x = self.conv1d_of_gpt2(torch.tanh(self.linear(self.norm(self.embedding(tokens)))))
        return self.conv2d(torch.tanh(self.conv1d(x)).unflatten(-1, (2, 4)))


ALL = ["embedding", "norm", "linear", "conv1d_of_gpt2", "conv1d", "conv2d"]
TOKENS = torch.tensor([[1, 2, 0, 4, 8], [5, 5, 3, 0, 1]])


def build(dtype=torch.float32, adapters=("default",), **fields):
    torch.manual_seed(0)
    base = Kinds().to(dtype)
    fields = {"target_modules": ALL, "density": 0.3, "include_bias": True, "init_weights": False, **fields}
    for i, name in enumerate(adapters):
        torch.manual_seed(i + 1)
        config = MagnitudeMaskConfig(**{**fields, "selection": ("smallest", "random")[i]})
        if i == 0:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    model.base_model.set_adapter(list(adapters))
    return model.train()


def loss_of(model):
    return model(TOKENS).float().square().sum()


def dense_gradients(model, adapter="default"):
    """By full differentiation of the merged model, in the places of the mask."""
    twin = copy.deepcopy(model)
    layers = layers_of(twin)
    places = {name: layer.changes(adapter) for name, layer in layers.items()}
    plain = twin.merge_and_unload().requires_grad_(True)
    plain.train()
    plain(TOKENS).float().square().sum().backward()
    found = []
    for name, changes in places.items():
        module = plain.get_submodule(name.removeprefix("base_model.model."))
        found += [getattr(module, each.name).grad.reshape(-1)[each.indices.index].float() for each in changes]
    return torch.cat(found)


@pytest.mark.parametrize("density", [0.04, 0.3, 1.0])
def test_every_kind_of_module(density):
    model = build(density=density, scope="model")
    loss_of(model).backward()
    torch.testing.assert_close(values_of(model).grad, dense_gradients(model), rtol=1e-4, atol=1e-5)
    assert {name: p.grad is not None for name, p in model.named_parameters()} == {
        name: "magnitude_mask_values" in name for name, _ in model.named_parameters()
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_of_the_base(dtype):
    model = build(dtype)
    loss_of(model).backward()
    assert values_of(model).grad.dtype == torch.float32
    close = dict(rtol=0.1, atol=0.5) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(values_of(model).grad, dense_gradients(model), **close)


@pytest.mark.parametrize("tokens", [1, 352, 1500])
@pytest.mark.parametrize("written", [torch.float32, torch.bfloat16, torch.float64])
def test_a_sampled_product_is_the_dense_one_at_its_places(tokens, written):
    drawn = torch.Generator().manual_seed(0)
    left, right = torch.randn(tokens, 24, generator=drawn), torch.randn(2 * tokens, 40, generator=drawn)[::2]
    left = left.to(written)
    index = torch.randperm(24 * 40, generator=drawn)[:30].sort().values
    dense = (left.double().t() @ right.double()).reshape(-1)[index]
    threads = torch.get_num_threads()
    for number in (1, 2):
        torch.set_num_threads(number)
        try:
            found = product_at(left, right, FlatIndices(index, (24, 40)))
        finally:
            torch.set_num_threads(threads)
        torch.testing.assert_close(found.double(), dense, rtol=1e-5, atol=1e-4)


def test_several_active_adapters_each_get_their_own():
    model = build(adapters=("default", "other"))
    loss_of(model).backward()
    for name in ("default", "other"):
        torch.testing.assert_close(values_of(model, name).grad, dense_gradients(model, name), rtol=1e-4, atol=1e-4)


def test_the_padding_row_is_left_alone():
    model = build(density=1.0)
    places = model.base_model.model.embedding.changes("default")[0].indices.index
    assert places.min() == 6
    with torch.no_grad():
        assert torch.equal(model.base_model.model.embedding(torch.tensor([0])), torch.zeros(1, 6))


def trained_gradient(model, batch, rounds=1):
    model.train()
    values_of(model).grad = None
    for _ in range(rounds):
        model(**batch).logits.square().sum().backward()
    return values_of(model).grad.clone()


def test_accumulation_and_two_forward_passes_before_one_backward(masked, tiny_batch):
    model = masked()
    once = trained_gradient(model, tiny_batch)
    torch.testing.assert_close(trained_gradient(model, tiny_batch, rounds=2), 2 * once)
    values_of(model).grad = None
    (model(**tiny_batch).logits.square().sum() + model(**tiny_batch).logits.square().sum()).backward()
    torch.testing.assert_close(values_of(model).grad, 2 * once)


@pytest.mark.parametrize("between", ["disable", "switch", "mode", "state dict", "merge"])
def test_what_happens_between_forward_and_backward_does_not_matter(between, masked, tiny_batch):
    """As in preference optimisation, where the reference runs between the two."""
    model = masked()
    torch.manual_seed(2)
    model.add_adapter("other", MagnitudeMaskConfig(density=0.2, init_weights=False))
    expected = trained_gradient(model, tiny_batch)
    values_of(model).grad = None
    loss = model(**tiny_batch).logits.square().sum()
    if between == "disable":
        with model.disable_adapter():
            logits(model, tiny_batch)
    elif between == "switch":
        model.set_adapter("other")
        logits(model, tiny_batch)
        model.set_adapter("default")
    elif between == "mode":
        logits(model.eval(), tiny_batch)
    elif between == "state dict":
        model.state_dict()
    else:
        model.merge_adapter()
        model.unmerge_adapter()
    loss.backward()
    assert torch.equal(values_of(model).grad, expected)


@pytest.mark.parametrize("between", ["step", "base", "delete", "unload"])
def test_a_backward_pass_through_what_is_gone_is_refused(between, masked, tiny_batch):
    model = masked().train()
    loss = model(**tiny_batch).logits.square().sum()
    if between == "step":
        with torch.no_grad():
            values_of(model).add_(0.1)
    elif between == "base":
        with torch.no_grad():
            list(layers_of(model).values())[-1].get_base_layer().weight[0, 0] += 1.0
    elif between == "delete":
        model.delete_adapter("default")
    else:
        model.unload()
    with pytest.raises(StaleGraphError, match="adapters of the forward pass"):
        loss.backward()


def test_bf16_autocast_in_training(masked, tiny_batch):
    model = masked()
    plain = trained_gradient(model, tiny_batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = trained_gradient(model, tiny_batch)
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast, plain, rtol=0, atol=0.1 * float(plain.abs().max()))


def test_no_copy_of_a_weight_is_kept_for_backward(masked, tiny_batch):
    """Of what autograd keeps, nothing is as large as a weight but the weights themselves and the activations."""
    model = masked().train()
    model(**tiny_batch)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    weights = {tuple(layer.get_base_layer().weight.shape) for layer in layers_of(model).values()}
    kept = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**tiny_batch).logits.sum()
    assert kept
    assert not weights & set(kept) - {tuple(tiny_batch["input_ids"].shape)}


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def test_compiled_in_one_graph():
    def build():
        torch.manual_seed(0)
        base = Pair()
        fields = dict(target_modules=["up", "down"], density=0.3, include_bias=True, init_weights=False)
        return get_peft_model(base, MagnitudeMaskConfig(**fields)).train()

    eager, model, own, x = build(), build(), base_tensors(build()), torch.randn(4, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        for each, run in ((eager, eager), (model, compiled)):
            run(x).square().sum().backward()
            with torch.no_grad():
                values_of(each).sub_(0.01 * values_of(each).grad)
            values_of(each).grad = None
        torch.testing.assert_close(values_of(model), values_of(eager))
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(x), eager.eval()(x))
        torch.testing.assert_close(model(x), eager(x))  # and then without the graph
    with model.disable_adapter():
        assert same(base_tensors(model), own)


def test_several_adapters_of_different_masks_in_one_graph():
    """Also when another is set, merged and unmerged, or deleted meanwhile."""
    torch.manual_seed(0)
    fields = dict(target_modules=["up", "down"], density=0.3, init_weights=False)
    model = get_peft_model(Pair(), MagnitudeMaskConfig(**fields))
    model.add_adapter("second", MagnitudeMaskConfig(**{**fields, "density": 0.5}))
    model.add_adapter("third", MagnitudeMaskConfig(**fields, selection="largest"))
    x, own = torch.randn(4, 6), base_tensors(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def same_as_without_the_graph() -> None:
        gradients = []
        for run in (model, compiled):
            model.zero_grad()
            run(x).square().sum().backward()
            gradients.append([values_of(model, name).grad for name in model.base_model.active_adapters])
        torch.testing.assert_close(gradients[1], gradients[0])
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))

    for names in (["default", "second", "third"], ["third", "second"]):
        model.base_model.set_adapter(names)
        same_as_without_the_graph()
    model.base_model.merge_adapter(["default", "third"])
    model.base_model.unmerge_adapter()
    torch.compiler.reset()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    model.base_model.set_adapter(["default", "second", "third"])
    model.delete_adapter("second")
    torch.compiler.reset()
    same_as_without_the_graph()
    with model.disable_adapter():
        assert same(base_tensors(model), own)
