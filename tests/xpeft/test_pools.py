"""Profiles over trained pools: a mask that chooses one adapter *is* that adapter."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_xmask import AdapterPool, BottleneckConfig, XPEFTConfig
from peft_xmask.errors import ConfigError, PoolMismatchError


def run(model: nn.Module, batch) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


@pytest.fixture
def make_adapters(tiny_bert, tiny_batch, tmp_path):
    """Saves three adapters of one kind; returns their folders and their outputs."""

    def make(config_for) -> tuple[list[str], list[torch.Tensor]]:
        folders, outputs = [], []
        for index in range(3):
            base = tiny_bert()
            torch.manual_seed(index + 1)
            model = get_peft_model(base, config_for(index))
            with torch.no_grad():
                for _, parameter in model.named_parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.2 * torch.randn_like(parameter))
            outputs.append(run(model, tiny_batch))
            folders.append(str(tmp_path / f"adapter-{index}"))
            model.save_pretrained(folders[-1])
        return folders, outputs

    return make


def lora(index: int) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=4 * (index + 1), target_modules=["query", "value"], lora_dropout=0.0)


def bottleneck(index: int) -> BottleneckConfig:
    return BottleneckConfig(bottleneck_size=6, scale=0.5 + index, activation="gelu", layer_norm=True)


@pytest.mark.parametrize(
    ("config_for", "build", "form"),
    [
        (lora, AdapterPool.from_lora, dict(insertion_form="parallel", activation="identity")),
        (bottleneck, AdapterPool.from_bottleneck, dict(activation="gelu", layer_norm=True)),
    ],
)
def test_choosing_one_adapter_gives_that_adapter(
    config_for, build, form, make_adapters, tiny_bert, tiny_batch, tmp_path
):
    folders, outputs = make_adapters(config_for)
    pool = build(folders)
    pool.save_pretrained(tmp_path / "pool")
    for source in (pool, str(tmp_path / "pool")):
        model = get_peft_model(tiny_bert(), XPEFTConfig(pool=source, top_k=1, **form))
        assert sorted(model.base_model.targeted_module_names) == pool.target_modules
        table = model.base_model.table
        for index, expected in enumerate(outputs):
            with torch.no_grad():
                logits = table.adapters["default"].logits.weight.view(2, -1, 3)
                logits.zero_()
                logits[..., index] = 1.0
            torch.testing.assert_close(run(model, tiny_batch), expected, atol=1e-5, rtol=1e-5)


def test_a_profile_over_a_saved_pool_comes_back_by_its_name(make_adapters, tiny_bert, tiny_batch, tmp_path):
    folders, _ = make_adapters(lora)
    AdapterPool.from_lora(folders).save_pretrained(tmp_path / "pool")
    config = XPEFTConfig(
        pool=str(tmp_path / "pool"), insertion_form="parallel", activation="identity", mask_type="soft"
    )
    model = get_peft_model(tiny_bert(), config)
    model.save_pretrained(tmp_path / "profile")
    again = PeftModel.from_pretrained(tiny_bert(), tmp_path / "profile")
    assert torch.equal(run(again, tiny_batch), run(model, tiny_batch))


def test_a_pool_that_was_never_saved_has_to_be_passed_again(make_adapters, tiny_bert, tiny_batch, tmp_path):
    folders, _ = make_adapters(lora)
    pool = AdapterPool.from_lora(folders)
    form = dict(insertion_form="parallel", activation="identity")
    model = get_peft_model(tiny_bert(), XPEFTConfig(pool=pool, **form))
    model.save_pretrained(tmp_path / "profile")
    with pytest.raises(PoolMismatchError, match=r"set config\.pool to it"):
        PeftModel.from_pretrained(tiny_bert(), tmp_path / "profile")
    config = XPEFTConfig.from_pretrained(tmp_path / "profile")
    config.pool = pool
    again = PeftModel.from_pretrained(tiny_bert(), tmp_path / "profile", config=config)
    assert torch.equal(run(again, tiny_batch), run(model, tiny_batch))


def test_another_form_than_the_pools_is_refused(make_adapters, tiny_bert):
    folders, _ = make_adapters(lora)
    with pytest.raises(PoolMismatchError, match="Pass insertion_form='parallel' to XPEFTConfig"):
        get_peft_model(tiny_bert(), XPEFTConfig(pool=AdapterPool.from_lora(folders), insertion_form="sequential"))


@pytest.mark.parametrize(
    ("base", "words"),
    [({"hidden_size": 32}, "read width 16"), ({"num_hidden_layers": 2}, "Expected the 6 sites of the pool, found 4")],
)
def test_a_base_of_another_width_or_depth_is_refused(base, words, make_adapters, tiny_bert):
    folders, _ = make_adapters(lora)
    other = tiny_bert(**base)
    names = [name for name, _ in other.named_modules()]
    config = XPEFTConfig(pool=AdapterPool.from_lora(folders), insertion_form="parallel", activation="identity")
    config.target_modules = {"query", "value"}
    with pytest.raises(PoolMismatchError, match=words):
        get_peft_model(other, config)
    assert [name for name, _ in other.named_modules()] == names


def test_loras_of_different_ranks_are_refused(make_adapters):
    folders, _ = make_adapters(lambda index: LoraConfig(r=4 + index, target_modules=["query"]))
    with pytest.raises(ConfigError, match="r=5 instead of 4"):
        AdapterPool.from_lora(folders)


def test_top_k_is_checked_against_the_pool(make_adapters, tiny_bert):
    folders, _ = make_adapters(lora)
    with pytest.raises(ConfigError, match="top_k=4 is invalid with 3 adapters"):
        XPEFTConfig(pool=AdapterPool.from_lora(folders), top_k=4)
