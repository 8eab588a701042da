"""Push from one process, load in others, with the real client."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file

CLIENT = Path(__file__).parent / "client.py"
ADAPTERS = (
    "xpeft", "xpeft on a branch", "private", "bottleneck", "masked", "biases", "default of two", "other of two",
    "over a pool", "over a pool on a branch", "over a pool in a subfolder", "around a common part",
    "over a fitted pool",
)  # fmt: skip
POOLS = {
    "pool": "ann/pool",
    "pool on a branch": "ann/pool@larger",
    "pool in a subfolder": "ann/pools/some/larger",
    "random pool": "ann/random-pool",
    "pool that was another": "ann/private-pool",
    "pool with a common part": "ann/common-pool",
    "fitted pool": "ann/fitted-pool",
}


@pytest.fixture(scope="session")
def told(pushed, client, tmp_path_factory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("told")
    client(CLIENT, "stranger", folder, home=tmp_path_factory.mktemp("home-of-a-stranger"))
    return json.loads((folder / "told.json").read_text())


@pytest.mark.parametrize("network", ["online", "offline"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_from_the_hub_gives_the_same_outputs(name, network, pushed, request):
    expected = load_file(pushed / "expected.safetensors")
    assert set(expected) == set(ADAPTERS)
    assert torch.equal(request.getfixturevalue(network).outputs[name], expected[name])


def test_the_adapters_differ(pushed):
    """Else the test above would not see one loaded for another."""
    outputs = list(load_file(pushed / "expected.safetensors").items())
    same = {(a, b) for i, (a, x) in enumerate(outputs) for b, y in outputs[i + 1 :] if torch.equal(x, y)}
    assert same == {("private", "xpeft on a branch")}


@pytest.mark.parametrize("network", ["online", "offline"])
@pytest.mark.parametrize("name", POOLS)
def test_a_pool_from_the_hub_is_the_same_and_knows_its_place(name, network, pushed, request):
    fingerprints = json.loads((pushed / "fingerprints.json").read_text())
    assert request.getfixturevalue(network).pools[name] == [fingerprints[name], POOLS[name]]


def test_a_config_names_the_pool_with_its_revision_and_subfolder(pushed, hub):
    configs = {id: json.loads(hub.repos[id].files("main")["adapter_config.json"]) for id in hub.repos if "over" in id}
    assert {id: config["pool"] for id, config in configs.items()} == {
        "ann/over-pool": "ann/pool",
        "ann/over-branch": "ann/pool@larger",
        "ann/over-subfolder": "ann/pools/some/larger",
        "ann/over-common": "ann/common-pool",
        "ann/over-fitted": "ann/fitted-pool",
    }


def test_a_common_part_is_pushed_with_its_pool_and_costs_a_profile_nothing(pushed, hub):
    """Of a pool that is otherwise a seed, it is all of the tensor file."""
    for name, inside in (("ann/common-pool", False), ("ann/fitted-pool", True)):
        files = hub.repos[name].files("main")
        assert set(files) == {"README.md", "pool.json", "pool.safetensors"}
        assert json.loads(files["pool.json"])["common"]["inside"] is inside
        assert "common part" in files["README.md"].decode()
    assert all(
        key.startswith("common/") for key in load(hub.repos["ann/common-pool"].files("main")["pool.safetensors"])
    )
    assert "| groups | 3 |" in hub.repos["ann/fitted-pool"].files("main")["README.md"].decode()
    for name in ("ann/over-common", "ann/over-fitted"):
        assert len(hub.repos[name].files("main")["adapter_model.safetensors"]) < 1200


def test_a_random_pool_leaves_no_tensors_of_the_pool_it_replaces(pushed, hub):
    repo = hub.repos["ann/private-pool"]
    assert any("pool.safetensors" in files for files in repo.commits.values())
    assert set(repo.files("main")) == {"README.md", "pool.json"}
    assert repo.private


def test_nothing_of_the_pool_or_the_base_is_pushed_with_a_profile(pushed, hub):
    files = hub.repos["ann/over-pool"].files("main")
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert len(files["adapter_model.safetensors"]) < 1200


def test_only_values_are_pushed_of_a_magnitude_mask(pushed, hub):
    files = hub.repos["ann/masked"].files("main")
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    tensors = load(files["adapter_model.safetensors"])
    values = tensors.pop("base_model.model.delta_table.magnitude_mask_values.weight")
    assert values.dtype == torch.bfloat16
    assert all(".classifier." in name for name in tensors)


def test_only_the_deltas_are_pushed_of_a_weight_adapter(pushed, hub):
    files = hub.repos["ann/biases"].files("main")
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    tensors = {
        name: each for name, each in load(files["adapter_model.safetensors"]).items() if ".classifier." not in name
    }
    assert {each.dtype for each in tensors.values()} == {torch.float16}
    assert sum(each.numel() for each in tensors.values()) == 2 * (24 + 16)  # blocks, widths of both linears


@pytest.mark.parametrize(
    "name", ["private pool", "private pool, wrong token", "private pool, other user", "private pool in a config"]
)
def test_a_private_pool_says_who_may_have_it_and_how(name, told):
    kind, message = told[name]
    assert kind == "ConfigError"
    for part in ("'ann/private-pool'", "private", "hf auth login", "HF_TOKEN", "token="):
        assert part in message


@pytest.mark.parametrize("name", ["push without a token", "push to another's"])
def test_a_push_that_is_not_allowed_says_so(name, told, hub):
    kind, message = told[name]
    assert kind == "ConfigError"
    assert "could not be pushed to 'ann/new-pool'" in message
    assert "hf auth login" in message
    assert "ann/new-pool" not in hub.repos


@pytest.mark.parametrize(
    ("name", "kind", "part"),
    [
        ("missing revision", "ConfigError", "'ann/pool' has no revision 'third'"),
        ("missing revision in the name", "ConfigError", "'ann/pool' has no revision 'third'"),
        ("two revisions", "ConfigError", "'ann/pool@larger' names a revision, and revision='third' is another"),
        ("an adapter, not a pool", "FileFormatError", "Expected a file pool.json"),
        ("no id", "ConfigError", "'not//an id' is neither a folder here nor a Hub repository"),
        ("private adapter", "ValueError", "Can't find 'adapter_config.json' at 'ann/private'"),
    ],
)
def test_other_mistakes_are_named(name, kind, part, told):
    assert told[name][0] == kind
    assert part in told[name][1]


def test_the_right_token_opens_a_private_pool(told, pushed):
    fingerprints = json.loads((pushed / "fingerprints.json").read_text())
    assert told["with the token"] == ["nothing", fingerprints["pool that was another"]]
