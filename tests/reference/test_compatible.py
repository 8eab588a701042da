"""What compatible() says, done: two adapters held, active, merged, stacked and mixed by PEFT itself."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from recipes import build_base, config_of, logits, stir

from peft_xmask.reference import compatible

PAIRS = [
    ("LORA", "LORA"),
    ("LORA", "LOHA"),
    ("LORA", "XPEFT"),
    ("LOHA", "OFT"),
    ("IA3", "IA3"),
    ("XPEFT", "XPEFT"),
    ("BOTTLENECK_ADAPTER", "BOTTLENECK_ADAPTER"),
    ("MAGNITUDE_MASK", "MAGNITUDE_MASK"),
    ("SHADOW", "SHADOW"),
    ("LN_TUNING", "LN_TUNING"),
    ("PREFIX_TUNING", "PREFIX_TUNING"),
    ("PREFIX_TUNING", "LORA"),
    ("ROAD", "ROAD"),
]
REFUSALS = (ValueError, TypeError, NotImplementedError, AttributeError, RuntimeError, KeyError)


def hold(first, second):
    """Both in one model, as far as PEFT goes: a PeftModel, or a PeftMixedModel for two methods."""
    torch.manual_seed(1)
    one, two = config_of(first, "llama"), config_of(second, "llama")
    try:
        model = get_peft_model(build_base("llama"), one, mixed=first != second)
    except REFUSALS:
        model = get_peft_model(build_base("llama"), one)
    stir(model)
    model.add_adapter("other", two)
    model.set_adapter("other")
    stir(model, seed=12)
    model.set_adapter("default")
    return model.eval()


def outputs(model, names):
    model.base_model.set_adapter(names)
    return logits(model)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_held_parallel_and_merged(first, second):
    verdict = compatible(first, second)
    try:
        model = hold(first, second)
    except REFUSALS:
        assert not verdict.held
        assert not verdict.parallel
        return
    assert verdict.held
    try:
        each = [outputs(model, name) for name in ("default", "other")]
        both = outputs(model, ["default", "other"])
        parallel = not any(torch.allclose(both, one, atol=1e-6) for one in each)
    except REFUSALS:
        parallel = False
    assert parallel == bool(verdict.parallel)
    if parallel and verdict.merged:
        torch.testing.assert_close(logits(model.merge_and_unload()), both, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("first", "second"), [pair for pair in PAIRS if pair[0] == pair[1] and pair[0] != "PREFIX_TUNING"]
)
def test_mixed(first, second):
    verdict = compatible(first, second)
    model = hold(first, second)
    each = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        each[name] = logits(model)
    names = ["default", "other", "other"]
    try:
        mixed = logits(model, adapter_names=names)
        right = all(torch.allclose(mixed[row], each[name][row], atol=1e-4) for row, name in enumerate(names))
    except REFUSALS:
        right = False
    assert right == bool(verdict.mixed)


@pytest.mark.parametrize(
    ("first", "second"), [("LORA", "XPEFT"), ("IA3", "LORA"), ("MAGNITUDE_MASK", "LORA"), ("XPEFT", "LORA")]
)
def test_stacked(first, second):
    verdict = compatible(first, second)
    under = get_peft_model(build_base("llama"), config_of(first, "llama")).eval()
    stir(under)
    expected = logits(under)
    try:
        merged = under.merge_and_unload()
    except REFUSALS:
        assert not verdict.stacked
        return
    assert verdict.stacked
    torch.testing.assert_close(logits(merged), expected, atol=2e-3, rtol=1e-3)
    before = copy.deepcopy(merged)
    over = get_peft_model(merged, config_of(second, "llama")).eval()
    stir(over)
    assert not torch.allclose(logits(over), logits(before), atol=1e-4)


def test_two_that_train_the_bases_biases_cannot_be_held():
    config = LoraConfig(bias="all")
    verdict = compatible(config, config)
    assert not verdict.held
    assert "biases" in verdict.held.reason
    model = get_peft_model(build_base("llama"), LoraConfig(bias="all"))
    with pytest.raises(ValueError, match="bias"):
        model.add_adapter("other", LoraConfig(bias="all"))


def test_every_verdict_says_why():
    for _, verdict in compatible("XPEFT", "PREFIX_TUNING"):
        assert verdict.reason
    assert "cannot be merged" in str(compatible("XPEFT", "LORA"))
