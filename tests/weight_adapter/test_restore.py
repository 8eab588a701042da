"""Serving adds nothing, the base's own numbers come back bit for bit, and neighbours find what they look for."""

import copy

import pytest
import torch
from adapted_models import base_tensors, layers_of, logits, same, stored
from peft import get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_xmask import WeightAdapterConfig
from peft_xmask.errors import BaseMismatchError, TargetError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WAYS = ["disable", "switch", "unmerge", "delete", "unload", "merge and unload", "state dict"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_back(way, dtype, adapted, biased_bert, tiny_batch):
    model = adapted(dtype, target="both")
    own = base_tensors(adapted(dtype, target="both"))
    expected = biased_bert().to(dtype).state_dict()
    logits(model, tiny_batch)
    assert not any(torch.equal(base_tensors(model)[name], each) for name, each in own.items())
    if way == "disable":
        with model.disable_adapter():
            assert same(base_tensors(model), own)
    elif way == "switch":
        model.add_adapter("other", WeightAdapterConfig(target_modules=["pooler.dense"]))
        model.set_adapter("other")
        assert same({name: base_tensors(model)[name] for name in own}, own)
    elif way == "unmerge":
        served = base_tensors(model)
        model.merge_adapter()
        assert same(base_tensors(model), served)
        model.unmerge_adapter()
        assert same(base_tensors(model), own)
    elif way == "delete":
        model.delete_adapter("default")
        assert same(base_tensors(model), own)
    elif way == "unload":
        model.merge_adapter()
        plain = model.unload().state_dict()
        assert all(torch.equal(plain[name], each) for name, each in expected.items() if "classifier" not in name)
    elif way == "merge and unload":
        before = base_tensors(model)
        plain = model.merge_and_unload()
        assert all(
            torch.equal(plain.get_parameter(name.removeprefix("base_model.model.")), before[name]) for name in own
        )
    else:
        state = model.state_dict()
        assert all(
            torch.equal(state[f"{name.replace('.dense.', '.dense.base_layer.')}"], each) for name, each in own.items()
        )


class Operations(TorchDispatchMode):
    """The operations that are run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("target", ["bias", "weight"])
@pytest.mark.parametrize("merged", [False, True])
def test_serving_runs_the_operations_of_the_base_and_no_others(target, merged, adapted, biased_bert, tiny_batch):
    model = adapted(target=target, inference_mode=True)
    with torch.no_grad():
        stored(model).normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    if merged:
        model.merge_adapter()
    first = logits(model, tiny_batch)
    base = biased_bert()
    assert not torch.equal(logits(base, tiny_batch), first)
    ran = []
    for each in (base, model.get_base_model()):
        with Operations() as operations:
            logits(each, tiny_batch)
        ran.append(operations.names)
    assert ran[0] == ran[1]


def test_a_copy_is_independent(adapted, tiny_batch):
    model, own = adapted(), base_tensors(adapted())
    out = logits(model, tiny_batch)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.mul_(2)
    assert not torch.equal(logits(twin, tiny_batch), out)
    assert torch.equal(logits(model, tiny_batch), out)
    with twin.disable_adapter():
        assert same(base_tensors(twin), own)


def test_several_adapters_add_up(adapted, tiny_batch):
    model, own = adapted(task_type=None, target="both"), base_tensors(adapted(target="both"))
    model.add_adapter("other", WeightAdapterConfig(target="both", r=2, init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    logits(model, tiny_batch)
    together = base_tensors(model)
    for name, layer in layers_of(model).items():
        for first, second in zip(layer.changes("default"), layer.changes("other"), strict=True):
            key = f"{name}.{first.name}"
            torch.testing.assert_close(together[key], own[key] + first.delta.detach() + second.delta.detach())
    with model.disable_adapter():
        assert same(base_tensors(model), own)


@pytest.mark.parametrize("target", ["bias", "both"])
def test_somebody_elses_change_is_not_written_over(target, adapted, tiny_batch):
    model = adapted(target=target)
    logits(model, tiny_batch)
    bias = next(iter(layers_of(model).values())).get_base_layer().bias
    with torch.no_grad():
        bias.add_(0.1)
    changed = bias.detach().clone()
    with pytest.raises(BaseMismatchError, match="changed while an adapter was active"):
        model.base_model.disable_adapter_layers()
    assert torch.equal(bias, changed)


@pytest.mark.parametrize("target", ["bias", "both"])
def test_one_graph_without_breaks(target, adapted, tiny_batch):
    """The numbers, and the gradients, are those of a model that is not compiled; steps are seen by the graph."""
    torch.compiler.reset()
    plain, model = adapted(target=target).train(), adapted(target=target).train()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    labels = torch.tensor([0, 1, 2, 3])
    for _ in range(2):
        found = []
        for each, call in ((plain, plain), (model, run)):
            call(**tiny_batch, labels=labels).loss.backward()
            found.append({name: p.grad.clone() for name, p in each.named_parameters() if p.grad is not None})
            with torch.no_grad():
                for parameter in each.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(0.1 * parameter.grad)
                        parameter.grad = None
        assert found[0].keys() == found[1].keys()
        for name, grad in found[0].items():
            torch.testing.assert_close(found[1][name], grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(logits(run.eval(), tiny_batch), logits(plain.eval(), tiny_batch))
    torch.compiler.reset()


def test_a_quantised_weight_keeps_its_module_from_all_but_its_bias(tmp_path):
    """As quantised linear modules of any kind have them: integers for a weight, floating point numbers for a bias."""

    class Quantised(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.weight = nn.Parameter(torch.randint(-9, 9, (4, 4), dtype=torch.int8), requires_grad=False)

        def forward(self, x):
            return nn.functional.linear(x, self.weight.float() / 9, self.bias)

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), Quantised())

    for target in ("weight", "both"):
        with pytest.raises(TargetError, match='Use target="bias"'):
            get_peft_model(build(), WeightAdapterConfig(target=target, target_modules=["1"]))
    model = get_peft_model(build(), WeightAdapterConfig(target_modules=["1"], r=2, init_weights=False))
    x = torch.randn(3, 4, requires_grad=True)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if p.requires_grad)
    (layer,) = layers_of(model).values()
    ((_, change),) = layer.result("default")
    base = build()
    with torch.no_grad():
        base[1].bias.add_(change)
    torch.testing.assert_close(model(x), base(x))
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), base(x))
    plain = model.unload().state_dict()
    assert all(torch.equal(plain[name], each) for name, each in build().state_dict().items())
