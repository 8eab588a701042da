"""`target_parameters`: parameters that are not a module's weight, named as for PEFT's LoRA."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import MixtralForCausalLM

from peft_xmask import BottleneckConfig, MagnitudeMaskConfig, WeightAdapterConfig, XPEFTConfig, fold
from peft_xmask.errors import ConfigError, TargetError
from peft_xmask.reference import describe

sys.path.insert(0, str(Path(__file__).parent / "conformance"))
from zoo import ZOO

KINDS = {kind.name: kind for kind in ZOO}
EXPERTS = {
    "MixtralForCausalLM": "mlp.experts",
    "Qwen2MoeForCausalLM": "mlp.experts",
    "Qwen3MoeForCausalLM": "mlp.experts",
    "GptOssForCausalLM": "mlp.experts",
    "Llama4ForCausalLM": "feed_forward.experts",
}
METHODS = {
    "magnitude mask": (MagnitudeMaskConfig, {"density": 0.2, "init_weights": False}),
    "weight adapter": (WeightAdapterConfig, {"r": 4, "init_weights": False, "activation": "gelu"}),
}


def config(method, **fields):
    config_cls, own = METHODS[method]
    return config_cls(**{**own, **fields})


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def numbers(module):
    return {name: each.detach().clone() for name, each in module.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", EXPERTS)
def test_the_parameters_that_lora_would_adapt_and_no_others(name, method, tmp_path):
    kind, names = KINDS[name], [f"{EXPERTS[name]}.gate_up_proj"]
    base, batch = kind.build(), kind.batch()
    before, own = numbers(base), logits(base, batch)
    model = get_peft_model(base, config(method, target_parameters=names)).eval()
    lora = get_peft_model(kind.build(), LoraConfig(target_parameters=names, target_modules=[]))
    assert model.base_model.targeted_parameter_names == lora.base_model.targeted_parameter_names
    found = logits(model, batch)
    assert not torch.equal(found, own)
    changed = {
        key.replace(".base_layer", "")
        for key, each in model.get_base_model().named_parameters()
        if key.replace(".base_layer", "") in before and not torch.equal(each, before[key.replace(".base_layer", "")])
    }
    assert changed == set(model.base_model.targeted_parameter_names)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), own)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(kind.build(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(logits(loaded, batch), found)
    loaded.merge_adapter()
    assert torch.equal(logits(loaded, batch), found)
    loaded.unmerge_adapter()
    assert same(numbers(loaded.unload()), before)
    assert torch.equal(logits(model.merge_and_unload(), batch), found)


@pytest.mark.parametrize("method", METHODS)
def test_through_transformers_own_door_and_folded(method, tmp_path):
    kind = KINDS["MixtralForCausalLM"]
    batch = kind.batch()
    model = get_peft_model(kind.build(), config(method, target_parameters=["experts.gate_up_proj"])).eval()
    found = logits(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    base = kind.build()
    base.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(base.eval(), batch), found)
    fold(model, tmp_path / "folded")
    plain = MixtralForCausalLM.from_pretrained(tmp_path / "folded", attn_implementation="eager")
    assert torch.equal(logits(plain.eval(), batch), found)


def by_hand(change, module, parameter, numbers):
    """Of each expert's matrix, with an output a row, what the adapter adds: one expert after another."""
    down, up = (change[f"weight_adapter_{parameter}_{part}"] for part in ("down", "up"))
    inputs_last = getattr(module, "is_transposed", None) is False
    matrices = numbers if inputs_last else numbers.transpose(1, 2)
    added = torch.stack([nn.functional.gelu(matrix @ down) @ up for matrix in matrices])
    return added if inputs_last else added.transpose(1, 2)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM", "Llama4ForCausalLM"])
def test_one_adapter_reads_the_matrix_of_every_expert_by_rows_of_its_inputs(name):
    """The change and its gradients are those of the formula, written down once more and differentiated by torch."""
    kind, parameter = KINDS[name], "gate_up_proj"
    base, batch = kind.build(), kind.batch()
    plain = copy.deepcopy(base).requires_grad_(False)
    place = next(key for key, _ in base.named_modules() if key.endswith(EXPERTS[name]))
    model = get_peft_model(base, config("weight adapter", target_parameters=[f"{place}.{parameter}"])).train()
    layer = model.get_base_model().get_submodule(place)
    factors = layer.factors("default")
    width = plain.config.get_text_config().hidden_size
    assert factors[f"weight_adapter_{parameter}_down"].shape == (width, 4)  # it reads a row: what an output reads
    model(**batch).logits.square().sum().backward()

    module = plain.get_submodule(place)
    twins = {key: each.detach().clone().requires_grad_() for key, each in factors.items()}
    own = getattr(module, parameter)
    whole = own + by_hand(twins, module, parameter, own)
    torch.testing.assert_close(getattr(layer.base_layer, parameter), whole)
    out = torch.func.functional_call(plain.train(), {f"{place}.{parameter}": whole}, kwargs=batch)
    out.logits.square().sum().backward()
    for key, each in twins.items():
        torch.testing.assert_close(factors[key].grad, each.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_adapters_of_other_parameters_side_by_side(method):
    kind = KINDS["MixtralForCausalLM"]
    base, batch = kind.build(), kind.batch()
    before = numbers(base)
    model = get_peft_model(base, config(method, target_parameters=["gate_up_proj"])).eval()
    first = logits(model, batch)
    fields = {"target": "weight"} if method == "weight adapter" else {}
    fields |= {"target_parameters": ["experts.down_proj"], "target_modules": ["q_proj"]}
    model.add_adapter("second", config(method, **fields))
    model.set_adapter("second")
    second = logits(model, batch)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, batch)
    assert not any(torch.equal(each, other) for each, other in ((first, second), (second, both), (first, both)))
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model, batch), first)
    assert same(numbers(model.unload()), before)


def test_target_says_which_parameters_of_a_module_and_not_which_named_ones():
    kind = KINDS["GptOssForCausalLM"]
    shapes = {}
    for target in ("bias", "weight", "both"):
        model = get_peft_model(kind.build(), WeightAdapterConfig(target=target, target_modules=["experts"]))
        layer = model.get_base_model().get_submodule("model.layers.0.mlp.experts")
        shapes[target] = [each.name for each in layer.weight_adapter_adapted["default"].adapted]
        model = get_peft_model(kind.build(), WeightAdapterConfig(target=target, target_parameters=["down_proj"]))
        assert model.base_model.targeted_parameter_names[0] == "model.layers.0.mlp.experts.down_proj"
    assert shapes["bias"] == ["gate_up_proj_bias", "down_proj_bias"]
    assert shapes["weight"] == ["gate_up_proj", "down_proj"]
    assert sorted(shapes["both"]) == sorted(shapes["bias"] + shapes["weight"])


def test_a_linear_layers_weight_can_be_named_too():
    kind = KINDS["LlamaForCausalLM"]
    batch = kind.batch()
    by_parameter = get_peft_model(kind.build(), config("magnitude mask", target_parameters=["q_proj.weight"])).eval()
    torch.manual_seed(0)
    by_module = get_peft_model(kind.build(), config("magnitude mask", target_modules=["q_proj"])).eval()
    vectors = [m.get_base_model().delta_table.holders["default"].weight for m in (by_parameter, by_module)]
    with torch.no_grad():
        vectors[0].copy_(vectors[1])
    assert torch.equal(logits(by_parameter, batch), logits(by_module, batch))


@pytest.mark.parametrize("method", METHODS)
def test_described_by_the_parameters_that_are_adapted(method):
    kind = KINDS["MixtralForCausalLM"]
    more = {"target": "both"} if method == "weight adapter" else {"density": 0.25}
    for fields in ({"target_parameters": ["experts.down_proj"]}, {"target_modules": ["experts", "q_proj"]}):
        model = get_peft_model(kind.build(), config(method, **fields, **more))
        facts = describe(model).adapters[0]
        assert facts.formula_parameters == facts.trainable_parameters
        assert facts.formula_bytes == facts.stored_bytes


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixed = nn.Parameter(torch.randn(2, 3, 3))

    def forward(self, x):
        return x @ self.mixed.mean(0)


class Around(nn.Module):
    """A module with a parameter and modules of its own, one of which is never called."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.linear, self.unused = nn.Linear(3, 3), Experts()

    def forward(self, x):
        return self.linear(x) * self.scale


@pytest.mark.parametrize("method", METHODS)
def test_a_parameter_of_a_module_that_is_never_called_is_reported(method):
    model = get_peft_model(nn.Sequential(Around()), config(method, target_parameters=["unused.mixed"]))
    with pytest.raises(TargetError, match=r"'0\.unused': 1 adapted module was not called"):
        model(torch.ones(1, 3))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_parameters": ["unused.mixe"]}, r"no parameter of the Sequential is called 'unused.mixe'"),
        ({"target_parameters": ["linear.mixed"]}, r"is called 'linear.mixed'.*Alike: '0.unused.mixed'"),
        ({"target_parameters": ["0.unused"]}, r"'0.unused' is a module, not a parameter. Name it in target_modules"),
        ({"target_parameters": ["scale"]}, r"'scale' belongs to '0', a Around around modules with parameters"),
        (
            {"target_parameters": ["linear.weight"], "target_modules": ["linear"]},
            r"'0.linear' is in target_modules, which adapts it as a whole, and target_parameters names its weight",
        ),
    ],
)
def test_names_that_cannot_be_are_refused_before_anything_changes(method, fields, words):
    base = nn.Sequential(Around())
    modules = dict(base.named_modules())
    with pytest.raises(TargetError, match=words):
        get_peft_model(base, config(method, **fields))
    assert dict(base.named_modules()) == modules


def test_a_parameter_of_the_model_itself_is_refused():
    with pytest.raises(TargetError, match="'mixed' is a parameter of the Experts itself"):
        get_peft_model(Experts(), MagnitudeMaskConfig(target_parameters=["mixed"]))


@pytest.mark.parametrize("given", ["experts.down_proj", ["experts", 3], [""]])
def test_anything_but_a_list_of_names_is_refused(given):
    with pytest.raises(ConfigError, match=r"target_parameters=.* is invalid: expected a list of names"):
        MagnitudeMaskConfig(target_parameters=given)


@pytest.mark.parametrize("config_cls", [XPEFTConfig, BottleneckConfig])
def test_methods_that_read_activations_say_what_to_pass(config_cls):
    with pytest.raises(ConfigError, match=r'Pass target_modules=\["mlp.experts"\], the module that holds'):
        config_cls(target_parameters=["mlp.experts.gate_up_proj"])
