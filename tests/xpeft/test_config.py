import json

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model

from peft_xmask import AdapterPool, XPEFTConfig
from peft_xmask.errors import BaseMismatchError, ConfigError
from peft_xmask.pool import BOTTLENECK_SIZE, NUM_ADAPTERS


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mask_type": "fuzzy"}, "mask_type='fuzzy' is unknown: expected one of 'hard', 'soft'"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": 101}, "top_k=101 is invalid with 100 adapters"),
        ({"num_adapters": 0}, "num_adapters=0"),
        ({"bottleneck_size": -1}, "bottleneck_size=-1"),
        ({"num_profiles": 0}, "num_profiles=0"),
        ({"num_adapters": 2.5}, "num_adapters=2.5"),
        ({"activation": "swishy"}, "activation='swishy'"),
        ({"insertion_form": "sideways"}, "insertion_form='sideways'"),
        ({"estimator": "magic"}, "estimator='magic'"),
        ({"mask_weighting": "max"}, "mask_weighting='max'"),
        ({"mask_weighting": "signed", "mask_type": "soft"}, 'mask_weighting="signed" is invalid with mask_type="soft"'),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"logit_scale": -1.0}, "logit_scale=-1.0"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"scale": float("inf")}, "scale=inf is invalid: expected a finite number above 0"),
        ({"scale": float("nan")}, "scale=nan"),
        ({"scale": "a"}, "scale='a'"),
        ({"scale": True}, "scale=True"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"logit_scale": float("inf")}, "logit_scale=inf"),
        ({"layer_norm": 7}, "layer_norm=7"),
        ({"mask_norm": "variance", "mask_weighting": "mean"}, "contradicts mask_norm='variance'"),
        ({"gumbel_noise": -0.1}, "gumbel_noise=-0.1"),
        ({"pool": 7}, "pool=7"),
        ({"layers_pattern": "layer"}, "`layers_to_transform` must also be specified"),
    ],
)
def test_bad_fields_are_refused_in_words(fields: dict, words: str):
    with pytest.raises(ConfigError) as caught:
        XPEFTConfig(**fields)
    assert words in str(caught.value)


def test_round_trip_through_json(tmp_path):
    config = XPEFTConfig(num_adapters=40, top_k=10, target_modules=["a", "b"], insertion_form="parallel", pool_seed=3)
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is XPEFTConfig
    assert again.to_dict() == config.to_dict()
    json.loads((tmp_path / "adapter_config.json").read_text())


def test_a_random_pool_object_becomes_its_seed():
    config = XPEFTConfig(pool=AdapterPool.random(30, 8, seed=5))
    assert (config.pool, config.num_adapters, config.bottleneck_size, config.pool_seed) == (None, 30, 8, 5)


def test_an_unknown_architecture_says_what_to_pass():
    from torch import nn

    from peft_xmask.errors import TargetError

    with pytest.raises(TargetError, match="Pass target_modules") as caught:
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), XPEFTConfig())
    assert "llama" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "weighting", "scale"),
    [
        ({}, "signed", 0.3),
        ({"num_adapters": 400}, "signed", 0.1),
        ({"num_adapters": 1600}, "signed", 0.025),
        ({"mask_type": "soft"}, "variance", 0.3),
        ({"mask_weighting": "variance", "scale": 0.5}, "variance", 0.5),
    ],
)
def test_what_is_left_open_follows_from_the_pool(fields: dict, weighting: str, scale: float):
    config = XPEFTConfig(**fields)
    config.resolve_pool()
    assert (config.mask_weighting, config.scale, config.top_k) == (weighting, scale, config.num_adapters // 2)


@pytest.mark.parametrize(("former", "weighting"), [("signs", "signed"), ("variance", "variance"), ("mean", "mean")])
def test_files_with_the_former_names_open_with_the_same_meaning(former, weighting, tmp_path):
    XPEFTConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    del fields["mask_weighting"]
    path.write_text(json.dumps({**fields, "mask_norm": former, "estimator": "identity"}))
    config = PeftConfig.from_pretrained(tmp_path)
    assert (config.mask_weighting, config.estimator) == (weighting, "straight_through")
    assert "mask_norm" not in config.to_dict()


def test_the_users_config_is_not_changed(tiny_bert):
    """It serves for another base too: what was found out about the first one is not in it."""
    config = XPEFTConfig(num_adapters=20, bottleneck_size=4, modules_to_save=["classifier"])
    before = config.to_dict()
    models = [get_peft_model(tiny_bert(seed=seed), config) for seed in (0, 1)]
    written_by_peft = {"base_model_name_or_path": config.base_model_name_or_path}
    assert config.to_dict() == {**before, **written_by_peft}
    found = [model.peft_config["default"] for model in models]
    assert found[0].base_fingerprint != found[1].base_fingerprint
    assert (found[0].top_k, found[0].activation, found[0].insertion_form) == (10, "relu", "sequential")


def test_loading_keeps_the_config_that_is_passed(tiny_bert, tmp_path):
    """As PEFT's own methods do. It is completed, so that a second save has the fingerprints too."""
    get_peft_model(tiny_bert(), XPEFTConfig(num_adapters=20, bottleneck_size=4)).save_pretrained(tmp_path / "first")
    config = XPEFTConfig(num_adapters=20, bottleneck_size=4)
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path / "first", config=config)
    assert loaded.peft_config["default"] is config
    loaded.save_pretrained(tmp_path / "second")
    first, second = ((tmp_path / name / "adapter_config.json").read_text() for name in ("first", "second"))
    assert first == second


def test_a_config_that_cannot_be_loaded_is_not_changed(tiny_bert, tmp_path):
    get_peft_model(tiny_bert(), XPEFTConfig(num_adapters=20, bottleneck_size=4)).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    config.inference_mode = True
    before = config.to_dict()
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(tiny_bert(seed=1), tmp_path, config=config)
    assert config.to_dict() == before


def test_a_config_for_any_base_serves_for_several(tiny_bert, tmp_path):
    get_peft_model(tiny_bert(), XPEFTConfig(num_adapters=20, bottleneck_size=4)).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    config.allow_any_base()
    models = [PeftModel.from_pretrained(tiny_bert(seed=seed), tmp_path, config=config) for seed in (1, 2)]
    first, second = (model.peft_config["default"].base_fingerprint for model in models)
    assert first != second
    assert None not in (first, second)


def test_too_many_profiles_are_refused_in_words(tiny_bert):
    for inference_mode in (False, True):
        config = XPEFTConfig(num_adapters=40_000, num_profiles=2**31 - 1, inference_mode=inference_mode)
        with pytest.raises(ConfigError, match="is too large for this machine: their masks take"):
            get_peft_model(tiny_bert(), config)
        for count in (2**31, 2**41, 2**64):
            with pytest.raises(ConfigError, match="expected at most 2,147,483,647"):
                XPEFTConfig(num_profiles=count, inference_mode=inference_mode)


@pytest.mark.parametrize(
    ("base_dtype", "asked", "found"),
    [
        (torch.float32, None, "float32"),
        (torch.bfloat16, None, "bfloat16"),
        (torch.float16, None, "float32"),
        (torch.bfloat16, "float32", "float32"),  # so says every adapter that was saved before there was a choice
    ],
)
def test_a_random_pool_is_held_in_bfloat16_where_the_base_is(base_dtype, asked, found, tiny_bert, tmp_path):
    model = get_peft_model(tiny_bert().to(base_dtype), XPEFTConfig(pool_dtype=asked))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["pool_dtype"] == found
    elsewhere = PeftModel.from_pretrained(tiny_bert(), tmp_path)  # of the same pool, whatever the base is in
    pools = [[m.down for m in each.modules() if type(m).__name__ == "PoolSlice"] for each in (model, elsewhere)]
    assert {part.dtype for part in pools[0]} == {getattr(torch, found)}
    assert all(torch.equal(part, same) for part, same in zip(*pools, strict=True))


def test_saved_adapters_state_the_size_of_their_pool(tiny_bert, tmp_path):
    """Another default in a later version cannot change them."""
    get_peft_model(tiny_bert(), XPEFTConfig()).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert [fields[name] for name in ("num_adapters", "bottleneck_size")] == [NUM_ADAPTERS, BOTTLENECK_SIZE]
