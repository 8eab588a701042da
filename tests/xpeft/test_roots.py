"""A pool that was grown under one root serves a model that calls its root something else."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_xmask import AdapterPool, BottleneckConfig, XPEFTConfig
from peft_xmask.core.sites import partners
from peft_xmask.errors import PoolMismatchError
from peft_xmask.integrations.pooled_classifier import MeanPooledClassifier

NAMES = ["encoder.layer.0.output.dense", "encoder.layer.1.output.dense"]


@pytest.fixture
def grown(tmp_path):
    """Makes a pool of two adapters that were put on a model, with random up-projections."""

    def grow(model):
        folders = []
        for seed in range(2):
            torch.manual_seed(seed)
            adapted = get_peft_model(model, BottleneckConfig(bottleneck_size=4))
            for name, parameter in adapted.named_parameters():
                if "adapter_up" in name:
                    torch.nn.init.normal_(parameter)
            folders.append(tmp_path / str(seed))
            adapted.save_pretrained(folders[-1])
            adapted.unload()
        return AdapterPool.from_bottleneck(folders)

    return grow


@pytest.mark.parametrize("to_mean", [True, False])
def test_a_pool_of_one_head_serves_the_other_and_its_profile_loads(to_mean, grown, tiny_bert, tiny_batch, tmp_path):
    def model_of(mean):
        plain = tiny_bert()
        return MeanPooledClassifier(plain.bert, 4).eval() if mean else plain

    torch.manual_seed(0)
    base = model_of(to_mean)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    plain = base(**tiny_batch).logits
    pool = grown(model_of(not to_mean))
    pool.save_pretrained(tmp_path / "pool")
    model = get_peft_model(base, XPEFTConfig(pool=str(tmp_path / "pool"))).eval()
    root = "backbone" if to_mean else "bert"
    assert model.peft_config["default"].target_modules == {
        f"{root}.encoder.layer.{block}.output.dense" for block in range(3)
    }
    logits = model(**tiny_batch).logits
    assert not torch.allclose(logits, plain)
    model.save_pretrained(tmp_path / "profile")
    fresh = model_of(to_mean)
    fresh.load_state_dict(before)
    assert torch.equal(PeftModel.from_pretrained(fresh, tmp_path / "profile").eval()(**tiny_batch).logits, logits)


def test_roots_of_other_names_are_the_same_place_but_one_tower_is_not_another():
    under_bert = [f"bert.{name}" for name in NAMES]
    assert partners([f"backbone.{name}" for name in NAMES], under_bert) == [[name] for name in under_bert]
    assert partners([f"0.auto_model.{name}" for name in NAMES], under_bert) == [[name] for name in under_bert]
    assert partners(NAMES, under_bert) == [[name] for name in under_bert]
    assert partners([name.replace("encoder", "decoder") for name in NAMES], NAMES) == [[], []]
    assert partners([f"vision_model.{NAMES[0]}"], [f"text_model.{NAMES[0]}"]) == [[]]
    assert partners(["net.0", "head.0"], ["mlp.0"]) == [[], []]
    assert partners(["backbone.encoder.layer.2.output.dense"], under_bert) == [[]]
    assert partners([f"bert.{NAMES[0]}", f"backbone.{NAMES[1]}"], under_bert) == [[under_bert[0]], []]


def test_sites_that_are_nowhere_in_the_model_are_still_an_error(grown, tiny_bert):
    pool = grown(tiny_bert())
    with pytest.raises(PoolMismatchError, match="3 sites of the pool, found 2"):
        get_peft_model(MeanPooledClassifier(tiny_bert(num_hidden_layers=2).bert, 4), XPEFTConfig(pool=pool))
