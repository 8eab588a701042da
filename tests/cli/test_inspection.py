"""`inspect` and `pool`: what lies on disk, without a model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file


def test_an_xpeft_folder(adapters, cli):
    facts = json.loads(cli("inspect", adapters["xpeft"], "--json").out)
    masks = facts["masks"]
    assert facts["method"] == "XPEFT"
    assert (masks["rows"], masks["sites"], masks["num_adapters"], masks["top_k"]) == (1, 6, 20, 10)
    assert masks["density"] == 0.5
    assert masks["used_down"] == [10] * 6
    assert len(masks["gain"]) == 6
    assert facts["sizes"]["payload_bytes"] == 2 * 6 * 3 + 6 * 2
    assert facts["sizes"]["file_bytes"] == (adapters["xpeft"] / "adapter_model.safetensors").stat().st_size
    assert len(facts["pool_fingerprint"]) == 16
    assert len(facts["base_fingerprint"]) == 16


def test_a_magnitude_mask_folder(adapters, cli):
    facts = json.loads(cli("inspect", adapters["magnitude-mask"], "--json").out)
    assert facts["method"] == "MAGNITUDE_MASK"
    assert facts["config"]["density"] == 0.005
    assert len(facts["config"]["mask_fingerprint"]) == 16
    assert facts["sizes"]["payload_bytes"] == pytest.approx(4 * 0.005 * 10_616_832, rel=1e-3)


def test_a_weight_adapter_folder(adapters, cli):
    facts = json.loads(cli("inspect", adapters["weight-adapter"], "--json").out)
    assert facts["method"] == "WEIGHT_ADAPTER"
    assert (facts["config"]["target"], facts["config"]["r"]) == ("bias", 16)
    assert facts["sizes"]["payload_bytes"] == 4 * 6 * (1536 + 384)


@pytest.mark.parametrize("method", ["xpeft", "bottleneck", "magnitude-mask", "weight-adapter", "lora", "head"])
def test_every_folder_prints_for_people_too(method, adapters, cli):
    done = cli("inspect", adapters[method])
    assert done.status == 0
    assert "payload" in done.out
    facts = json.loads(cli("inspect", adapters[method], "--json").out)
    assert (facts["sizes"]["payload_bytes"] == 0) == (method == "head")
    assert sum(tensor["bytes"] for tensor in facts["tensors"]) == (
        facts["sizes"]["payload_bytes"] + facts["sizes"]["head_bytes"]
    )


def test_a_bare_file_is_read_without_its_config(adapters, cli, tmp_path):
    bare = tmp_path / "profile.safetensors"
    shutil.copy(adapters["xpeft"] / "adapter_model.safetensors", bare)
    facts = json.loads(cli("inspect", bare, "--json").out)
    assert facts["kind"] == "tensor file"
    assert facts["masks"]["mask_type"] == "hard"
    assert facts["masks"]["top_k"] == 10
    assert cli("inspect", bare).status == 0


def test_damaged_masks_are_refused(adapters, cli, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(adapters["xpeft"], folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith("xpeft_bits.weight"))
    tensors[name][0, 0, 0] = torch.tensor([255, 255, 15], dtype=torch.uint8)
    save_file(tensors, path)
    done = cli("inspect", folder)
    assert done.status == 2
    assert "Expected exactly top_k=10" in done.err


def test_a_truncated_file_and_other_things_are_refused(adapters, cli, tmp_path):
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes((adapters["lora"] / "adapter_model.safetensors").read_bytes()[:1000])
    empty = tmp_path / "empty"
    empty.mkdir()
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "adapter_config.json").write_text("[1, 2")
    for path in (torn, empty, odd, tmp_path / "missing"):
        done = cli("inspect", path)
        assert done.status == 2
        assert done.err.count("error:") == 1


def test_a_random_pool_is_built_and_inspected(cli, tmp_path):
    folder = tmp_path / "pool"
    built = cli("pool", "build", "--out", folder, "--num-adapters", 30, "--bottleneck-size", 6, "--seed", 5)
    assert built.status == 0
    for command in (("pool", "inspect"), ("inspect",)):
        facts = json.loads(cli(*command, folder, "--json").out)
        assert facts["kind"] == "random pool"
        assert (facts["num_adapters"], facts["bottleneck_size"]) == (30, 6)
        assert facts["fingerprint"] in built.out
    assert cli("pool", "build", "--out", folder).status == 2
    assert cli("pool", "build", "--out", tmp_path / "none", "--num-adapters", 0).status == 2


def test_a_pool_is_fitted_and_inspected(rows, minilm, cli, tmp_path):
    """The chapters of docstrings play the tasks; one is held out."""
    table = tmp_path / "rows.jsonl"
    lines = [{"text": text, "label": str(len(text) > 60), "chapter": chapter} for text, chapter in rows]
    table.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    pool, columns = tmp_path / "pool", ("--profile-column", "chapter", "--held-out", rows[0][1])
    short = ("--size", 8, "--bottleneck-size", 4, "--layers", 1, "--epochs", 1, "--group-steps", 2, "--max-length", 16)
    command = ("pool", "fit", "--base", minilm, "--data", table, "--out", pool, *columns, *short)
    refused = cli(*command)
    assert refused.status == 2
    assert "Lower min_examples" in refused.err
    done = cli(*command, "--min-examples", 8)
    assert done.status == 0, done.err
    assert not (tmp_path / "pool-run").exists()
    facts = json.loads(cli("pool", "inspect", pool, "--json").out)
    assert facts["fingerprint"] in done.out
    assert facts["fitting"]["data"] == "rows.jsonl"
    assert (facts["fitting"]["groups"], facts["fitting"]["held out"]) == (2, 1)
    assert "held out" in cli("pool", "inspect", pool).out
    assert cli(*command).status == 2


@pytest.mark.parametrize(("command", "method"), [("from-lora", "lora"), ("from-bottleneck", "bottleneck")])
def test_a_pool_of_trained_adapters_carries_a_profile(command, method, adapters, data, minilm, cli, tmp_path):
    pool = tmp_path / "pool"
    given = [adapters[method], adapters[method]]
    built = cli("pool", command, *given, "--out", pool, "--dtype", "bfloat16")
    assert built.status == 0, built.err
    facts = json.loads(cli("pool", "inspect", pool, "--json").out)
    assert facts["num_adapters"] == 2
    assert facts["dtype"] == "bfloat16"
    assert facts["nbytes"] > 0


def test_pools_of_unlike_adapters_are_refused(adapters, cli, tmp_path):
    done = cli("pool", "from-lora", adapters["bottleneck"], "--out", tmp_path / "pool")
    assert done.status == 2
    assert done.err.count("error:") == 1
    assert cli("pool", "from-lora", adapters["lora"], "--out", tmp_path / "pool", "--dtype", "int8").status == 2
    assert not (tmp_path / "pool").exists()
