"""The golden folders were written by `adapters` 1.3.0; see golden/make_adapterhub.py."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, BertModel, DistilBertConfig, DistilBertModel

from peft_xmask.core.adapter import AdapterPair, adapt
from peft_xmask.core.sites import Site
from peft_xmask.errors import ConfigError, FileFormatError, PeftXMaskWarning
from peft_xmask.pool import AdapterPool

BERT = BertConfig(
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=16,
    vocab_size=20,
    max_position_embeddings=16,
)
DISTILBERT = DistilBertConfig(dim=8, n_layers=2, n_heads=2, hidden_dim=16, vocab_size=20, max_position_embeddings=16)


def output_with_adapter(model, pool, recorded):
    """The base model's output with adapter 0 of the pool on the output of each site, and without it."""
    state = {name.removeprefix("base."): t for name, t in recorded.items() if name.startswith("base.")}
    assert not model.load_state_dict(state, strict=False).missing_keys
    model.eval()
    with torch.no_grad():
        bare = model(recorded["input"])[0]
        parts = pool.bind([Site(name, 8, 8) for name in pool.target_modules])
        for name, part in zip(pool.target_modules, parts, strict=True):
            pair = AdapterPair(part.down[0], part.up[0], part.down_bias[0], part.up_bias[0])
            model.get_submodule(name).register_forward_hook(
                lambda module, args, y, pair=pair: y + adapt(y, pair, activation=pool.activation, layer_norm=False)
            )
        return model(recorded["input"])[0], bare


@pytest.mark.parametrize(
    ("folder", "make", "activation"),
    [
        ("adapterhub_bert", lambda: BertModel(BERT), "silu"),
        ("adapterhub_distilbert", lambda: DistilBertModel(DISTILBERT), "gelu"),
    ],
)
def test_an_adapter_that_reads_the_modules_output_computes_what_adapterhub_computed(golden, folder, make, activation):
    recorded = load_file(golden / folder / "recorded.safetensors")
    pool = AdapterPool.from_bottleneck([golden / folder])
    assert (pool.activation, pool.insertion_form, pool.layer_norm) == (activation, "sequential", False)
    found, bare = output_with_adapter(make(), pool, recorded)
    torch.testing.assert_close(found, recorded["output"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, bare, atol=1e-2)


def test_seq_bn_is_read_with_a_warning_that_it_is_not_the_same(golden):
    """Its adapters read a normalised sum that no linear module gives; the warning is true."""
    folder = golden / "adapterhub_seq_bn"
    with pytest.warns(PeftXMaskWarning, match="original_ln_before=True"):
        pool = AdapterPool.from_bottleneck([folder, folder])
    assert pool.num_adapters == 2
    assert pool.target_modules == [f"bert.encoder.layer.{i}.output.dense" for i in range(2)]
    weights, recorded = load_file(folder / "adapter.safetensors"), load_file(folder / "recorded.safetensors")
    key = "bert.encoder.layer.1.output.adapters.news.adapter_"
    part = pool.bind([Site(f"encoder.layer.{i}.output.dense", 8, 8) for i in range(2)])[1]
    for name, tensor in (("down.0", part.down), ("up", part.up)):
        assert torch.equal(tensor[1], weights[f"{key}{name}.weight"])
    assert torch.equal(part.down_bias[0], weights[f"{key}down.0.bias"])
    assert torch.equal(part.up_bias[0], weights[f"{key}up.bias"])
    found, _ = output_with_adapter(BertForSequenceClassification(BERT), pool, recorded)
    assert not torch.allclose(found, recorded["output"], atol=1e-3)


@pytest.fixture
def changed(golden, tmp_path):
    """A copy of a golden folder with fields of its config, or of the config inside it, changed."""

    def change(**fields):
        folder = tmp_path / "changed"
        shutil.copytree(golden / "adapterhub_bert", folder, dirs_exist_ok=True)
        path = folder / "adapter_config.json"
        data = json.loads(path.read_text())
        for name, value in fields.items():
            (data if name in ("model_type", "version", "name", "config") else data["config"])[name] = value
        path.write_text(json.dumps(data))
        return folder

    return change


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mh_adapter": True}, "mh_adapter=True: a second adapter after the attention"),
        ({"is_parallel": True}, "is_parallel=True"),
        ({"output_adapter": False}, "output_adapter=False"),
        ({"inv_adapter": "nice"}, "invertible"),
        ({"ln_before": True, "use_gating": True}, "ln_before=True.*use_gating=True"),
        ({"phm_layer": True}, "Kronecker"),
        ({"original_ln_after": False}, "original_ln_after=False"),
        ({"original_ln_before": True, "residual_before_ln": False}, "residual_before_ln=False"),
        ({"architecture": "lora"}, "architecture='lora'"),
        ({"non_linearity": "leakyrelu"}, "leakyrelu"),
        ({"model_type": "gpt2"}, "model_type 'gpt2'.*'distilbert'"),
        ({"version": "3.2.1"}, "version '3.2.1'"),
    ],
)
def test_forms_that_a_pool_cannot_take_are_refused(changed, fields, words):
    with pytest.raises(ConfigError, match=words):
        AdapterPool.from_bottleneck([changed(**fields)])


@pytest.mark.parametrize("fields", [{"name": "sports"}, {"config": "pfeiffer"}, {"scaling": "learned"}])
def test_configs_that_do_not_fit_the_file_are_refused(changed, fields):
    with pytest.raises(FileFormatError, match="Expected"):
        AdapterPool.from_bottleneck([changed(**fields)])


def test_pickles_are_never_read(changed):
    folder = changed()
    (folder / "adapter.safetensors").rename(folder / "pytorch_adapter.bin")
    with pytest.raises(FileFormatError, match=r"pytorch_adapter\.bin, a pickle"):
        AdapterPool.from_bottleneck([folder])


def test_a_file_that_lacks_a_bias_is_refused(changed):
    folder = changed()
    path = folder / "adapter.safetensors"
    save_file(
        {
            key: tensor
            for key, tensor in load_file(path).items()
            if not key.endswith("1.output.adapters.news.adapter_up.bias")
        },
        path,
    )
    with pytest.raises(FileFormatError, match=r"up\.bias"):
        AdapterPool.from_bottleneck([folder])
