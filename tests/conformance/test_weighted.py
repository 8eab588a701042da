"""``add_weighted_adapter``: an exact sum where a sum is an adapter, words where it is not."""

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from methods import METHODS
from peft import PeftModel, get_peft_model
from torch import Tensor

from peft_xmask.errors import ConfigError

ADDS = [method for method in METHODS if not method.config_cls.__name__.startswith("XPEFT")]
WEIGHTS = [0.25, -0.5]


@pytest.fixture
def mlp() -> Architecture:
    return next(each for each in ARCHITECTURES if each.name == "mlp")


def of_two(method, architecture) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(architecture.build(), method.config(**architecture.fields)).eval()
    model.add_adapter("b", method.config(**architecture.fields))
    method.shift(model, "b")
    return model


def first_output(model: PeftModel, batch: dict[str, Tensor], seen: str) -> Tensor:
    """What the first adapted module returns: before it, nothing depends on the adapter."""
    found: list[Tensor] = []
    handle = model.base_model.model.get_submodule(seen).register_forward_hook(lambda _, __, y: found.append(y))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("adding", ADDS, ids=[method.name for method in ADDS])
def test_the_sum_is_exact(adding, mlp, tmp_path):
    model = of_two(adding, mlp)
    kind = {} if "bottleneck" in adding.name else {"combination_type": "linear"}
    model.add_weighted_adapter(["default", "b"], WEIGHTS, "sum", **kind)
    assert model.active_adapters == ["default"]
    outputs = {}
    for name in ("default", "b", "sum"):
        model.set_adapter(name)
        outputs[name] = first_output(model, mlp.batch, mlp.site)
    with model.disable_adapter():
        own = first_output(model, mlp.batch, mlp.site)
    changes = {name: output - own for name, output in outputs.items()}
    expected = sum(weight * changes[name] for weight, name in zip(WEIGHTS, ("default", "b"), strict=True))
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(changes["sum"], expected, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(mlp.build(), tmp_path / "sum").eval()
    assert torch.equal(first_output(loaded, mlp.batch, mlp.site), outputs["sum"])


@pytest.mark.parametrize("adding", ADDS, ids=[method.name for method in ADDS])
@pytest.mark.parametrize(
    ("adapters", "weights", "name"),
    [(["default", "nobody"], WEIGHTS, "new"), (["default", "b"], WEIGHTS, "b"), (["default", "b"], [1.0], "new"),
     (["default", "b"], [1.0, float("nan")], "new"), ([], [], "new")],
)  # fmt: skip
def test_invalid_names_and_weights_are_refused(adding, mlp, adapters, weights, name):
    model = of_two(adding, mlp)
    with pytest.raises(ConfigError, match="Expected"):
        model.add_weighted_adapter(adapters, weights, name)
    assert set(model.peft_config) == {"default", "b"}


def test_bottlenecks_that_differ_are_refused(mlp):
    (method,) = (each for each in METHODS if each.name == "bottleneck")
    model = of_two(method, mlp)
    model.add_adapter("other", method.config(**mlp.fields, activation="gelu"))
    with pytest.raises(ConfigError, match="same activation and insertion form"):
        model.add_weighted_adapter(["default", "other"], WEIGHTS, "new")
    with pytest.raises(ConfigError, match="combination_type='svd' is unknown: expected one of 'cat'"):
        model.add_weighted_adapter(["default", "b"], WEIGHTS, "new", combination_type="svd")


@pytest.mark.parametrize("name", ["xpeft", "xpeft-soft", "xpeft-identity"])
def test_masks_have_no_weighted_sum(name, mlp):
    (method,) = (each for each in METHODS if each.name == name)
    model = of_two(method, mlp)
    with pytest.raises(ConfigError, match="a sum of k-of-N masks does not choose k of N"):
        model.add_weighted_adapter(["default", "b"], WEIGHTS, "new")
    assert set(model.peft_config) == {"default", "b"}
