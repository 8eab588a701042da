import contextlib
import copy
import gc
import json
import pickle
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_xmask.core.sites import Site
from peft_xmask.errors import ConfigError, FileFormatError, PoolMismatchError
from peft_xmask.pool import AdapterPool


@pytest.fixture
def trained(make_bottleneck):
    return AdapterPool.from_bottleneck([make_bottleneck(f"adapter-{seed}", seed=seed)[0] for seed in range(3)])


@pytest.fixture
def saved(trained, tmp_path):
    folder = tmp_path / "pool"
    trained.save_pretrained(folder)
    return folder


def same_tensors(a, b):
    return all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p.buffers(), q.buffers(), strict=True)
    )


def test_a_random_pool_is_saved_as_its_seed(tmp_path):
    pool = AdapterPool.random(9, 4, seed=2**64 - 1, dtype=torch.bfloat16)
    pool.save_pretrained(tmp_path / "pool")
    assert pool.name_or_path == str(tmp_path / "pool")
    assert sorted(path.name for path in (tmp_path / "pool").iterdir()) == ["README.md", "pool.json"]
    assert (tmp_path / "pool" / "pool.json").stat().st_size < 300
    loaded = AdapterPool.from_pretrained(tmp_path / "pool")
    assert loaded == pool
    assert (loaded.seed, loaded.dtype, loaded.name_or_path) == (pool.seed, torch.bfloat16, str(tmp_path / "pool"))
    assert AdapterPool.from_pretrained(tmp_path / "pool", dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_trained_pool_comes_back_bit_for_bit(make_bottleneck, ffn_sites, tmp_path, dtype):
    folders = [make_bottleneck(f"adapter-{seed}", seed=seed, activation="silu")[0] for seed in range(3)]
    pool = AdapterPool.from_bottleneck(folders, dtype=dtype)
    pool.save_pretrained(tmp_path / "pool")
    loaded = AdapterPool.from_pretrained(tmp_path / "pool")
    assert (loaded.dtype, loaded.nbytes, loaded.activation) == (dtype, pool.nbytes, "silu")
    assert loaded == pool
    assert same_tensors(loaded.bind(ffn_sites), pool.bind(ffn_sites))


def test_a_cast_keeps_the_fingerprint_and_other_numbers_do_not(make_bottleneck, saved, trained):
    for dtype in (torch.bfloat16, torch.float16):
        assert AdapterPool.from_pretrained(saved, dtype=dtype).fingerprint == trained.fingerprint
    other = AdapterPool.from_bottleneck([make_bottleneck(f"other-{seed}", seed=seed + 1)[0] for seed in range(3)])
    assert other.fingerprint != trained.fingerprint


def test_loads_of_one_file_share_their_tensors_and_let_them_go(saved, ffn_sites):
    for dtype in (None, torch.float16):
        first = AdapterPool.from_pretrained(saved, dtype=dtype).bind(ffn_sites)
        second = AdapterPool.from_pretrained(saved, dtype=dtype).bind(ffn_sites)
        assert all(a.down is b.down and a.origin == b.origin for a, b in zip(first, second, strict=True))
        alive = weakref.ref(first[0].down)
        del first
        gc.collect()
        assert alive() is not None
        del second
        gc.collect()
        assert alive() is None


def test_the_same_adapters_at_another_scale_are_another_pool(make_lora, tmp_path):
    """Signs cannot tell them apart; the norms do."""
    slices, prints = [], set()
    for alpha in (4, 64):
        _, folder = make_lora(f"alpha-{alpha}", lora_alpha=alpha)
        AdapterPool.from_lora([folder]).save_pretrained(tmp_path / f"pool-{alpha}")
        pool = AdapterPool.from_pretrained(tmp_path / f"pool-{alpha}")
        prints.add(pool.fingerprint)
        slices.append(pool.bind([Site(name, 32, 16) for name in pool.target_modules]))
    torch.testing.assert_close(slices[1][0].up, slices[0][0].up * 16)
    assert slices[0][0].origin != slices[1][0].origin
    assert len(prints) == 2


def test_a_pool_stored_in_another_dtype_is_the_same_pool(saved, trained, tmp_path):
    AdapterPool.from_pretrained(saved, dtype=torch.bfloat16).save_pretrained(tmp_path / "low")
    low = AdapterPool.from_pretrained(tmp_path / "low")
    assert low.dtype == torch.bfloat16
    assert low == trained


def test_other_norms_than_the_recorded_are_refused(saved, edit_json):
    norms = json.loads((saved / "pool.json").read_text())["norms"]
    edit_json(saved / "pool.json", norms=[norms[0] * 2, *norms[1:]])
    with pytest.raises(PoolMismatchError, match="rescaled"):
        AdapterPool.from_pretrained(saved)


def test_no_path_of_this_machine_is_in_the_files(saved, tmp_path):
    for name in ("pool.json", "README.md"):
        text = (saved / name).read_text()
        assert str(tmp_path) not in text
        assert "adapter-2" in text


def test_the_model_card_runs(saved):
    from peft import get_peft_model
    from transformers import BertConfig, BertModel

    card = (saved / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    assert code.startswith("import peft_xmask\n")
    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=30)
    names = {"base_model": BertModel(config)}
    exec(code.replace("path-or-hub-id-of-this-pool", str(saved)), names)
    assert isinstance(names["model"], type(get_peft_model(BertModel(config), names["peft_xmask"].XPEFTConfig())))
    assert names["pool"].fingerprint in card


def test_copies_are_the_pool_itself_and_a_pickled_pool_is_equal(trained, ffn_sites):
    for pool in (trained, AdapterPool.random(3, 4)):
        assert copy.deepcopy({"pool": pool})["pool"] is copy.copy(pool) is pool
        twin = pickle.loads(pickle.dumps(pool))
        assert twin == pool
        assert hash(twin) == hash(pool)
        assert same_tensors(twin.bind(ffn_sites), pool.bind(ffn_sites))
    assert trained != "trained"


def test_a_subfolder(trained, tmp_path):
    trained.save_pretrained(tmp_path / "repository" / "inside")
    loaded = AdapterPool.from_pretrained(tmp_path / "repository", subfolder="inside")
    assert loaded == trained
    assert loaded.name_or_path == str(tmp_path / "repository" / "inside")


def test_saving_over_another_pool_leaves_only_the_new_one(saved, trained, tmp_path):
    random = AdapterPool.random(3, 4)
    random.save_pretrained(saved)
    assert AdapterPool.from_pretrained(saved) == random
    assert not (saved / "pool.safetensors").exists()
    trained.save_pretrained(saved)
    assert AdapterPool.from_pretrained(saved) == trained


def test_saving_a_loaded_pool_over_its_own_file(saved, trained, ffn_sites):
    loaded = AdapterPool.from_pretrained(saved)
    loaded.save_pretrained(saved)
    assert same_tensors(loaded.bind(ffn_sites), trained.bind(ffn_sites))
    assert AdapterPool.from_pretrained(saved) == trained


@contextlib.contextmanager
def full_disk():
    """No file can grow beyond 100 bytes. Only around the call in question: the test runner writes files, too."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_save_that_fails_leaves_the_old_pool_whole(saved, trained):
    other = AdapterPool.from_pretrained(saved, dtype=torch.float16)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(Exception, match="File too large"), full_disk():
        other.save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert AdapterPool.from_pretrained(saved) == trained


FIELDS = [
    ("format", "something"),
    ("format_version", 2),
    ("format_version", True),
    ("kind", "mixed"),
    ("kind", ["lora"]),
    ("num_adapters", 0),
    ("num_adapters", "3"),
    ("num_adapters", 4),
    ("bottleneck_size", 5),
    ("bottleneck_size", 4.0),
    ("dtype", "float64"),
    ("dtype", "float16"),
    ("fingerprint", ...),
    ("insertion_form", "both"),
    ("activation", "none"),
    ("layer_norm", 0),
    ("sites", []),
    ("sites", [1]),
    ("sites", [{"name": "a", "in_features": 16, "out_features": 16}]),
    ("sites", [{"name": "a", "in_features": 16, "out_features": 16, "biases": True}]),
    ("sources", ["one"]),
    ("sources", [1, 2, 3]),
    ("norms", [1.0]),
    ("norms", ["one"]),
    ("file_bytes", -1),
    ("file_sha256", "0"),
    ("file_sha256", "0" * 64),
    ("seed", 3),
    ("surprise", 1),
]


@pytest.mark.parametrize(("field", "value"), FIELDS)
def test_a_field_that_cannot_be_is_refused(saved, edit_json, field, value):
    edit_json(saved / "pool.json", **{field: value})
    with pytest.raises(FileFormatError, match="Expected"):
        AdapterPool.from_pretrained(saved)


@pytest.mark.parametrize(("field", "value"), [("seed", -1), ("seed", 2**64), ("seed", ...), ("num_adapters", 0)])
def test_a_field_of_a_random_pool_that_cannot_be_is_refused(tmp_path, edit_json, field, value):
    AdapterPool.random(3, 4).save_pretrained(tmp_path)
    edit_json(tmp_path / "pool.json", **{field: value})
    with pytest.raises(FileFormatError, match=field):
        AdapterPool.from_pretrained(tmp_path)


def test_another_fingerprint_than_recorded_is_refused_naming_both(saved, trained, edit_json, tmp_path):
    edit_json(saved / "pool.json", fingerprint="0123456789abcdef")
    with pytest.raises(PoolMismatchError, match=rf"0123456789abcdef.*{trained.fingerprint}") as caught:
        AdapterPool.from_pretrained(saved)
    assert (caught.value.expected, caught.value.found) == ("0123456789abcdef", trained.fingerprint)
    AdapterPool.random(3, 4).save_pretrained(tmp_path / "random")
    edit_json(tmp_path / "random" / "pool.json", seed=1)
    with pytest.raises(PoolMismatchError):
        AdapterPool.from_pretrained(tmp_path / "random")


@pytest.mark.parametrize("damage", ["truncated", "oversized", "one bit", "missing", "other tensors"])
def test_a_damaged_tensor_file_is_refused(saved, edit_json, damage):
    path = saved / "pool.safetensors"
    data = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(data[:-1])
    elif damage == "oversized":
        path.write_bytes(data + b"\0")
    elif damage == "one bit":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "missing":
        path.unlink()
    else:
        import hashlib

        save_file({**load_file(path), "more": torch.ones(1)}, path)
        data = path.read_bytes()
        edit_json(saved / "pool.json", file_bytes=len(data), file_sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(FileFormatError, match=r"pool\.safetensors"):
        AdapterPool.from_pretrained(saved)


def test_folders_that_are_no_pool_are_refused(tmp_path):
    with pytest.raises(FileFormatError, match=r"pool\.json"):
        AdapterPool.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="neither a folder here nor"):
        AdapterPool.from_pretrained("somebody/never-downloaded-pool")
    (tmp_path / "pool.json").write_text(json.dumps(["a list"]))
    with pytest.raises(FileFormatError, match="JSON object"):
        AdapterPool.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="found a file"):
        AdapterPool.random().save_pretrained(tmp_path / "pool.json")
