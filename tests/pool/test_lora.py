import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_xmask.core.sites import Site
from peft_xmask.errors import ConfigError, FileFormatError, PoolMismatchError
from peft_xmask.pool import AdapterPool


def lora_sites(model):
    """Sites of a parallel adapter: the modules' own widths."""
    return [
        Site(name.removeprefix("base_model.model."), module.in_features, module.out_features)
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    ]


def delta(model, site):
    return model.get_submodule(f"base_model.model.{site.name}").get_delta_weight("default")


def test_each_adapter_of_the_pool_is_its_lora(make_lora):
    """Different alphas, rsLoRA and alpha_pattern: the product is always what PEFT adds to the weight."""
    made = [
        make_lora("plain", seed=0, lora_alpha=8),
        make_lora("strong", seed=1, lora_alpha=32),
        make_lora("rs", seed=2, lora_alpha=8, use_rslora=True),
        make_lora("pattern", seed=3, lora_alpha=8, alpha_pattern={"layer.1.output.dense": 3, "output.dense": 5}),
        make_lora("head", seed=4, modules_to_save=["classifier"]),
    ]
    pool = AdapterPool.from_lora([folder for _, folder in made])
    sites = lora_sites(made[0][0])
    assert [(site.in_features, site.out_features) for site in sites] == [(32, 16), (32, 16)]
    for site, part in zip(sites, pool.bind(sites), strict=True):
        assert part.down.shape == (5, 4, 32)
        assert part.up.shape == (5, 16, 4)
        assert part.down_bias is None
        assert part.up_bias is None
        for i, (model, _) in enumerate(made):
            torch.testing.assert_close(part.up[i] @ part.down[i], delta(model, site), rtol=1e-5, atol=1e-6)


def test_what_a_lora_pool_says_of_itself(make_lora):
    model, folder = make_lora("one")
    pool = AdapterPool.from_lora([folder])
    assert (pool.kind, pool.num_adapters, pool.bottleneck_size, pool.seed) == ("lora", 1, 4, None)
    assert (pool.insertion_form, pool.activation, pool.layer_norm) == ("parallel", "identity", False)
    assert pool.mask_weighting == "mean"
    assert pool.target_modules == sorted(site.name for site in lora_sites(model))
    assert pool.nbytes == 2 * (4 * 32 + 16 * 4) * 4


def test_many_kinds_of_modules_and_order_of_sites(make_lora):
    model, folder = make_lora("qv", target_modules=["query", "value", "dense"])
    sites = lora_sites(model)[::-1]
    for site, part in zip(sites, AdapterPool.from_lora([folder]).bind(sites), strict=True):
        torch.testing.assert_close(part.up[0] @ part.down[0], delta(model, site), rtol=1e-5, atol=1e-6)


def test_dtype_is_the_files_own_or_the_one_asked_for(make_lora):
    folders = [make_lora(name, seed=seed)[1] for seed, name in enumerate("ab")]
    for folder in folders:
        path = folder / "adapter_model.safetensors"
        save_file({key: tensor.bfloat16() for key, tensor in load_file(path).items()}, path)
    half = AdapterPool.from_lora(folders)
    assert half.dtype == torch.bfloat16
    assert AdapterPool.from_lora(folders, dtype=torch.float16).dtype == torch.float16
    assert AdapterPool.from_lora(folders, dtype=torch.float32) == half


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 8}, r"r=8 instead of 4"),
        ({"target_modules": ["query"]}, r"2 more .*attention\.self\.query.*2 missing .*output\.dense"),
    ],
)
def test_adapters_that_differ_are_refused_with_the_difference(make_lora, fields, words):
    folders = [make_lora("first")[1], make_lora("second", seed=1)[1], make_lora("odd", **fields)[1]]
    with pytest.raises(ConfigError, match=rf"1 of 3 do not[^$]*'odd': .*{words}") as caught:
        AdapterPool.from_lora(folders)
    assert "'second'" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"layer.0.output.dense": 2}}, "rank_pattern"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "pissa.*path_initial_model_for_weight_conversion"),
        ({"target_modules": ["word_embeddings"]}, "lora_embedding_.*adapted embedding"),
    ],
)
def test_loras_that_are_more_than_two_matrices_are_refused(make_lora, fields, words):
    with pytest.raises(ConfigError, match=words):
        AdapterPool.from_lora([make_lora("variant", **fields)[1]])


def test_convolutions_are_refused(make_lora):
    _, folder = make_lora("conv")
    path = folder / "adapter_model.safetensors"
    save_file({key: tensor[..., None, None].contiguous() for key, tensor in load_file(path).items()}, path)
    with pytest.raises(ConfigError, match="convolutions"):
        AdapterPool.from_lora([folder])


def test_another_method_is_refused(make_lora, edit_json):
    _, folder = make_lora("other")
    edit_json(folder / "adapter_config.json", peft_type="IA3")
    with pytest.raises(ConfigError, match="found 'IA3'"):
        AdapterPool.from_lora([folder])


def test_pickles_are_never_read(make_lora):
    _, folder = make_lora("old")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(FileFormatError, match=r"adapter_model\.bin, a pickle"):
        AdapterPool.from_lora([folder])


@pytest.mark.parametrize("damage", ["truncated", "half an adapter", "not a lora", "no config", "config not json"])
def test_damaged_folders_are_refused(make_lora, damage):
    _, folder = make_lora("damaged")
    path, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "half an adapter":
        save_file(
            {key: tensor for key, tensor in load_file(path).items() if "layer.0.output.dense.lora_B" not in key}, path
        )
    elif damage == "not a lora":
        save_file({"weight": torch.ones(2)}, path)
    elif damage == "no config":
        config.unlink()
    else:
        config.write_text(config.read_text()[:40])
    with pytest.raises(FileFormatError, match="damaged"):
        AdapterPool.from_lora([folder])


def test_values_that_are_not_finite_are_refused_with_the_adapters_name(make_lora):
    good, bad = make_lora("good")[1], make_lora("bad", seed=1)[1]
    path = bad / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=r"NaN.*\['bad'\]"):
        AdapterPool.from_lora([good, bad])


def test_untrained_adapters_are_refused(make_lora):
    with pytest.raises(ConfigError, match="freshly made"):
        AdapterPool.from_lora([make_lora("fresh", init_lora_weights=True)[1]])


def test_an_empty_list_a_bare_name_and_an_unknown_folder_are_refused(make_lora, tmp_path):
    with pytest.raises(ConfigError, match="at least one"):
        AdapterPool.from_lora([])
    with pytest.raises(ConfigError, match="in a list"):
        AdapterPool.from_lora(str(make_lora("alone")[1]))
    with pytest.raises(ConfigError, match="neither a folder here nor"):
        AdapterPool.from_lora([tmp_path / "nowhere"])


def test_saved_from_another_root_the_sites_still_match(make_lora):
    """One LoRA of the whole classifier, one of its encoder alone: the names differ by a prefix."""
    model, folder = make_lora("whole")
    _, other = make_lora("encoder", seed=1)
    path = other / "adapter_model.safetensors"
    save_file({key.replace("model.bert.", "model."): tensor for key, tensor in load_file(path).items()}, path)
    sites = lora_sites(model)
    short = [Site(site.name.removeprefix("bert."), site.in_features, site.out_features) for site in sites]
    parts = AdapterPool.from_lora([folder, other]).bind(sites)
    turned = AdapterPool.from_lora([other, folder]).bind(short)
    for a, b in zip(parts, turned, strict=True):
        assert torch.equal(a.up, b.up.flip(0))


def test_binding_checks_count_names_and_widths(make_lora):
    model, folder = make_lora("bound")
    pool, sites = AdapterPool.from_lora([folder]), lora_sites(model)
    with pytest.raises(PoolMismatchError, match="2 sites of the pool, found 1"):
        pool.bind(sites[:1])
    with pytest.raises(PoolMismatchError, match=r"found 3 .*Not in the pool: 'more'") as caught:
        pool.bind([*sites, Site("more", 32, 16)])
    assert caught.value.expected == sorted(site.name for site in sites)
    with pytest.raises(PoolMismatchError, match="Only in the pool: 'bert"):
        pool.bind([sites[0], Site("elsewhere", 32, 16)])
    with pytest.raises(PoolMismatchError, match="read width 32 and write width 16") as caught:
        pool.bind([sites[0], Site(sites[1].name, 64, 16)])
    assert (caught.value.expected, caught.value.found) == ((32, 16), (64, 16))
    with pytest.raises(PoolMismatchError, match="one to one"):
        pool.bind([Site("output.dense", 32, 16), sites[0]])


def test_alpha_that_is_no_number_is_refused(make_lora):
    _, folder = make_lora("odd_alpha")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": "8"}))
    with pytest.raises(FileFormatError, match="lora_alpha"):
        AdapterPool.from_lora([folder])
