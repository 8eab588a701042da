"""Adapters on bases they were not made for."""

import pytest
import torch
from peft import get_peft_model
from recipes import BASES, build, build_base, logits, stir

from peft_xmask import AdapterPool, BottleneckConfig, XPEFTConfig
from peft_xmask.errors import BaseMismatchError, ConfigError, TargetError
from peft_xmask.reference import card_for, cards, port
from peft_xmask.reference.port import why_not_portable


def other_base(name="llama"):
    """The same shape with other weights."""
    BASES[name].build()
    torch.manual_seed(99)
    return BASES[name].make().eval()


def test_a_bottleneck_adapter_takes_effect_on_another_base(tmp_path):
    model = build("BOTTLENECK_ADAPTER").eval()
    stir(model)
    model.save_pretrained(tmp_path)
    base = other_base()
    with pytest.raises(BaseMismatchError):
        type(model).from_pretrained(other_base(), tmp_path)
    plain = logits(base)
    ported = port(tmp_path, to=base).eval()
    assert not torch.allclose(logits(ported), plain, atol=1e-4)
    with ported.disable_adapter():
        assert torch.equal(logits(ported), plain)
    down = "base_model.model.model.layers.0.mlp.down_proj.bottleneck_adapter_down.default.weight"
    assert torch.equal(ported.state_dict()[down], model.state_dict()[down])


@pytest.mark.parametrize("kind", ["random", "trained"])
def test_masks_come_with_their_pool(kind, tmp_path):
    pool = AdapterPool.random(12, 6, seed=3)
    if kind == "trained":
        for index in range(3):
            grown = get_peft_model(build_base("llama"), BottleneckConfig(task_type="CAUSAL_LM", bottleneck_size=6))
            stir(grown, seed=index)
            grown.save_pretrained(tmp_path / str(index))
        pool = AdapterPool.from_bottleneck([tmp_path / str(index) for index in range(3)])
        pool.save_pretrained(tmp_path / "pool")
        pool = AdapterPool.from_pretrained(str(tmp_path / "pool"))
    model = get_peft_model(build_base("llama"), XPEFTConfig(task_type="CAUSAL_LM", pool=pool, scale=3.0)).eval()
    stir(model)
    model.save_pretrained(tmp_path / "masks")
    base = other_base()
    plain = logits(base)
    ported = port(tmp_path / "masks", to=base).eval()
    assert not torch.allclose(logits(ported), plain, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "named"),
    [
        ("LORA", "Parameters adapted: reparameterisation"),
        ("PREFIX_TUNING", r"Input type: data \(embedding\)"),
        ("MAGNITUDE_MASK", "Input type: weights"),
        ("SHADOW", "Workspace: block"),
    ],
)
def test_the_rest_is_refused_with_the_property_that_forbids_it(method, named, tmp_path):
    build(method).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=named):
        port(tmp_path, to=other_base())


def test_other_widths_are_refused(tmp_path):
    build("BOTTLENECK_ADAPTER").save_pretrained(tmp_path)
    base = BASES["llama"].build()
    base.config.hidden_size, base.config.head_dim = 32, 8
    with pytest.raises(TargetError, match="equal widths"):
        port(tmp_path, to=type(base)(base.config))


def test_a_base_without_such_modules_is_refused(tmp_path):
    build("BOTTLENECK_ADAPTER", target_modules=["down_proj"]).save_pretrained(tmp_path)
    with pytest.raises(TargetError, match="modules of the same names"):
        port(tmp_path, to=BASES["t5"].build())


def test_only_what_reads_activations_alone_is_ported():
    assert {card.method for card in cards() if why_not_portable(card) is None} >= {"XPEFT", "BOTTLENECK_ADAPTER"}
    assert why_not_portable(card_for("XLORA"))
