import pytest
import torch

from peft_xmask.core.sites import Site
from peft_xmask.errors import ConfigError, FileFormatError
from peft_xmask.pool import AdapterPool

SITE = "bert.encoder.layer.1.output.dense"


def test_tensors_are_stacked_with_the_scale_in_the_up_projection(make_bottleneck, ffn_sites):
    made = [make_bottleneck("plain", seed=0), make_bottleneck("scaled", seed=1, scale=0.3)]
    pool = AdapterPool.from_bottleneck([folder for folder, _ in made])
    part = dict(zip((site.name for site in ffn_sites), pool.bind(ffn_sites), strict=True))[SITE]
    for i, scale in enumerate((1.0, 0.3)):
        tensors = {key.rpartition("adapter_")[2]: t for key, t in made[i][1].items() if SITE in key}
        assert torch.equal(part.down[i], tensors["down.weight"])
        assert torch.equal(part.down_bias[i], tensors["down.bias"])
        assert torch.equal(part.up[i], tensors["up.weight"] * scale)
        assert torch.equal(part.up_bias[i], tensors["up.bias"] * scale)


def test_what_a_bottleneck_pool_says_of_itself(make_bottleneck):
    folder, _ = make_bottleneck("one", activation="tanh", layer_norm=True, insertion_form="parallel", bias=False)
    pool = AdapterPool.from_bottleneck([folder])
    assert (pool.kind, pool.num_adapters, pool.bottleneck_size, pool.mask_weighting) == ("bottleneck", 1, 4, "mean")
    assert (pool.activation, pool.layer_norm, pool.insertion_form) == ("tanh", True, "parallel")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"activation": "gelu"}, "activation='gelu' instead of 'relu'"),
        ({"layer_norm": True}, "layer_norm=True instead of False"),
        ({"insertion_form": "parallel"}, "insertion_form='parallel' instead of 'sequential'"),
        ({"size": 8}, "bottleneck_size=8 instead of 4"),
        ({"bias": False}, "use_bias=False instead of True"),
        ({"sites": (SITE,)}, "1 missing"),
        ({"base_fingerprint": "b" * 16}, "base_fingerprint='bbbb"),
    ],
)
def test_adapters_that_differ_are_refused_with_the_difference(make_bottleneck, fields, words):
    first, _ = make_bottleneck("first", base_fingerprint="a" * 16)
    odd, _ = make_bottleneck("odd", **{"base_fingerprint": "a" * 16, **fields})
    with pytest.raises(ConfigError, match=f"'odd': .*{words}"):
        AdapterPool.from_bottleneck([first, odd])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bottleneck_size", 5),
        ("bottleneck_size", "4"),
        ("activation", "none"),
        ("activation", ["relu"]),
        ("layer_norm", 1),
        ("insertion_form", ...),
        ("scale", None),
        ("use_bias", False),
    ],
)
def test_configs_that_do_not_fit_are_refused(make_bottleneck, edit_json, field, value):
    folder, _ = make_bottleneck("one")
    edit_json(folder / "adapter_config.json", **{field: value})
    with pytest.raises(FileFormatError, match="Expected"):
        AdapterPool.from_bottleneck([folder])


def test_a_lora_is_refused_with_the_call_to_use(make_lora):
    with pytest.raises(ConfigError, match="from_lora"):
        AdapterPool.from_bottleneck([make_lora("lora")[1]])


def test_real_adapters_of_our_own_type_become_a_pool(tmp_path):
    """Trainable parameters that PEFT saved: one adapter of the pool computes what its model does."""
    from peft import get_peft_model
    from transformers import BertConfig, BertModel

    from peft_xmask.core.adapter import AdapterPair, adapt
    from peft_xmask.tuners.bottleneck import BottleneckConfig

    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=30)
    folders, models = [], []
    for seed in range(2):
        torch.manual_seed(0)
        base = BertModel(config)
        torch.manual_seed(seed)
        model = get_peft_model(base, BottleneckConfig(bottleneck_size=4, init_weights=False, scale=0.5)).eval()
        models.append(model)
        folders.append(tmp_path / str(seed))
        model.save_pretrained(folders[-1])
    layer = "encoder.layer.1.output.dense"
    pool = AdapterPool.from_bottleneck(folders)
    part = pool.bind([Site(f"encoder.layer.{i}.output.dense", 16, 16) for i in range(2)])[1]
    x = torch.randn(3, 32)
    for i, model in enumerate(models):
        module = model.get_submodule(f"base_model.model.{layer}")
        y = module.base_layer(x)
        pair = AdapterPair(part.down[i], part.up[i], part.down_bias[i], part.up_bias[i])
        torch.testing.assert_close(y + adapt(y, pair, activation="relu", layer_norm=False), module(x))
