"""train_profiles(ray=...): real local clusters, workers and whole fleets that are killed, and what is refused."""

import importlib.util
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch
from peft import get_peft_model

from peft_xmask.errors import ConfigError, FleetError, MissingExtraError
from peft_xmask.profiles import ProfileBank, RayFleet, train_profiles
from peft_xmask.training.shards import cut, own_examples

SCRIPT = Path(__file__).with_name("sharded.py")
spec = importlib.util.spec_from_file_location("sharded", SCRIPT)
sharded = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sharded)
taught = sharded.taught

HEAD = "base_model.model.classifier.weight"
TWO_PARTS = ({"ann", "bob"}, {"Zoë", "张伟"})


def processes_of(clusters: Path) -> list[str]:
    """Names of processes of clusters whose files lie there: Ray renames its processes, their environment stays."""
    found = []
    for process in psutil.process_iter(["name", "environ", "status"]):
        environment = process.info["environ"] or {}
        if environment.get("RAY_TMPDIR") == str(clusters) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.info["name"])
    return found


def wait_until(there, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, f"waited {seconds} seconds"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def clusters():
    """A folder for whatever Ray writes, with a short name since sockets lie in it; nothing runs in it in the end."""
    pytest.importorskip("ray", reason="Ray is not installed")
    folder = Path(tempfile.mkdtemp(prefix="fleet"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(folder))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray writes a token into the home folder
        patch.delenv("RAY_ADDRESS", raising=False)
        yield folder
    wait_until(lambda: not processes_of(folder))  # agents of a cluster that was killed notice it after a while
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def ray(clusters):
    """A cluster that this process is connected to."""
    import ray

    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20,
        _temp_dir=str(clusters),
    )  # fmt: skip
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def killed_fleet(clusters, tmp_path_factory):
    """Folder of a fleet with its own cluster: the first shard is finished, the second half-way, everything dies."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "armed").touch()
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    wait_until(lambda: (folder / "stuck").exists() or process.poll() is not None)
    assert process.poll() is None, process.stderr.read().decode()[-3000:]
    assert any("raylet" in name for name in processes_of(clusters))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    worker = sharded.made(folder)[1][-1]
    wait_until(lambda: not psutil.pid_exists(worker))
    return folder


@pytest.fixture(scope="module")
def survived(ray, tmp_path_factory):
    """A fleet of two workers, one of which is killed half-way: its folder, and the bank."""
    folder = tmp_path_factory.mktemp("survived")
    (folder / "armed").touch()
    bank = sharded.train(folder, RayFleet(2, retries=1), "killed")
    assert not (folder / "armed").exists()
    return folder, bank


def files_of(bank: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in bank.iterdir() if path.suffix in (".safetensors", ".json")}


def test_a_fleet_that_was_killed_as_a_whole_goes_on(killed_fleet, survived):
    out = killed_fleet / "out"
    assert (out / "shard-00000-of-00002" / "finished.json").is_file()
    assert not (out / "shard-00001-of-00002" / "finished.json").exists()
    with pytest.raises(ConfigError, match="resume=True"):
        sharded.train(killed_fleet, RayFleet(2))
    with pytest.raises(ConfigError, match="as many parts as before"):
        sharded.train(killed_fleet, RayFleet(2, shards=3), resume=True)
    with pytest.raises(ConfigError, match=r"sampling_temperature=2\.0"):
        sharded.train(killed_fleet, RayFleet(2), resume=True, sampling_temperature=1.0)
    flipped = taught.examples().map(lambda row: {"labels": 3 - row["labels"]})
    with pytest.raises(ConfigError, match=r"shard of another run.*examples='[0-9a-f]{16}' \(this run has"):
        sharded.train(killed_fleet, RayFleet(2), resume=True, dataset=flipped)
    before = len(sharded.made(killed_fleet)[0])
    bank = sharded.train(killed_fleet, RayFleet(2), resume=True)
    made = sharded.made(killed_fleet)
    assert len(made[0]) == before
    assert made[1].count(made[1][-1]) < before
    assert files_of(out / "bank") == files_of(survived[0] / "out" / "bank")
    assert bank.metrics == survived[1].metrics
    again = sharded.train(killed_fleet, RayFleet(2), resume=True)
    assert again.metrics == bank.metrics
    assert sharded.made(killed_fleet) == made


def test_a_killed_worker_changes_nothing(survived, tmp_path):
    """The bank is that of the same parts, each trained in one process without Ray."""
    folder, bank = survived
    made = sharded.made(folder)
    assert len(set(made[0])) == 1
    assert len(set(made[1])) == 2
    killed, other = (made[1].count(process) for process in dict.fromkeys(made[1]))
    assert killed == 20
    assert other < len(made[0])  # it went on from a checkpoint
    alone = []
    for number, names in enumerate(TWO_PARTS):
        parts = [
            data.filter(lambda row, of=names: row["user"] in of) for data in (taught.examples(), taught.examples(1))
        ]
        args = taught.arguments(tmp_path / f"training-{number}", num_train_epochs=5)
        alone.append(
            train_profiles(
                taught.base(), parts[0], validation=parts[1], config=taught.config(), head="frozen", patience=None,
                args=args, progress=False,
            )
        )  # fmt: skip
    expected = ProfileBank.merge(alone, tmp_path / "bank")
    assert list(expected) == list(bank)
    assert all(expected[name] == bank[name] for name in bank)
    assert bank.shared.keys() == expected.shared.keys()
    assert all(torch.equal(tensor, expected.shared[name]) for name, tensor in bank.shared.items())
    assert list(bank) == list(taught.COUNTS)
    assert bank.metrics == {**alone[0].metrics, **alone[1].metrics}
    assert bank.config.training["shards"] == 2
    assert bank.config.training["profiles"] == 4


def test_what_fails_again_and_again_is_said_and_the_rest_is_kept(ray, tmp_path):
    """With a head that is trained once, here; then new profiles join by a fleet of their own."""
    (tmp_path / "armed").touch()
    fields = {"head": "first", "validation": None}
    with pytest.raises(FleetError, match=r"Shard 1 of 2 .*'Zoë' to '张伟'.* 2 times, .*disk is on fire") as caught:
        sharded.train(tmp_path, RayFleet(1, shards=2, retries=1), "wrong", at=2, **fields)
    assert caught.value.shard == 1
    assert "1 shards are finished" in str(caught.value)
    bank = sharded.train(tmp_path, RayFleet(1, shards=2), resume=True, **fields)
    assert not torch.equal(bank.shared[HEAD], taught.base().classifier.weight)
    assert all(facts["best_step"] is None for facts in bank.metrics.values())

    args = taught.arguments(tmp_path / "more", num_train_epochs=1)
    newcomers = taught.examples(5, {"dan": 4, "eve": 6, "bob": 3})
    joined = train_profiles(taught.base(), newcomers, bank=bank, args=args, ray=RayFleet(1, shards=2), progress=False)
    assert set(joined) == {*taught.COUNTS, "dan", "eve"}
    assert list(joined.metrics) == ["dan", "eve", "bob"]
    assert all(joined[name] == bank[name] for name in taught.COUNTS if name != "bob")
    assert torch.equal(joined.shared[HEAD], bank.shared[HEAD])
    wrong = taught.base()
    with torch.no_grad():
        wrong.bert.encoder.layer[0].output.dense.weight.neg_()
    args = taught.arguments(tmp_path / "wrong", num_train_epochs=1)
    with pytest.raises(ConfigError, match="refused shard 0 of 1: BaseMismatchError"):
        train_profiles(wrong, newcomers, bank=bank, args=args, ray=1, progress=False)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"head": "joint"}, "head='first'"),
        ({"head": None}, "exchange no gradients"),
        ({"args": None}, "Expected args="),
        ({"ray": 5}, "5 shards, found 4"),
        ({"ray": 0}, "workers=0"),
        ({"ray": True}, "workers=True"),
        ({"model": get_peft_model(taught.base(), taught.config(num_profiles=4))}, "Expected the base model"),
        ({"sampling_temperature": 0.5}, "sampling_temperature=0.5"),
    ],
)
def test_what_cannot_be_is_refused_before_ray_starts(fields, words, tmp_path):
    settings = {"head": "frozen", "config": taught.config(), "args": taught.arguments(tmp_path), "ray": 2, **fields}
    with pytest.raises(ConfigError, match=words):
        train_profiles(settings.pop("model", taught.base()), taught.examples(), **settings)
    assert not list(tmp_path.glob("shard-*"))


@pytest.mark.parametrize("numbers", [{"shards": 1}, {"retries": -1}, {"cpus_per_worker": 0}, {"gpus_per_worker": -1}])
def test_fleets_that_cannot_be(numbers):
    with pytest.raises(ConfigError, match=f"{next(iter(numbers))}=.* is invalid"):
        RayFleet(2, **numbers)


def test_without_ray(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"peft_xmask\[fleet\]"):
        train_profiles(taught.base(), taught.examples(), head="frozen", args=taught.arguments(tmp_path), ray=2)


@pytest.mark.parametrize("counts", [[3, 20, 9, 12], [1, 1, 1, 500], [500, 1, 1, 1], [7] * 9, [2]])
def test_shards_have_each_profile_once_and_about_as_many_examples(counts):
    rows = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    for total in range(1, len(counts) + 1):
        shards = cut(rows, total)
        assert [shard.first for shard in shards] == [0, *(shard.end for shard in shards[:-1])]
        assert shards[-1].end == len(counts)
        assert min(map(len, shards)) >= 1
        most = max(sum(counts[shard.first : shard.end]) for shard in shards)
        assert most <= sum(counts) / total + max(counts)


@pytest.mark.parametrize("form", ["datasets", "formatted", "list"])
def test_a_worker_is_sent_its_own_examples_only(form):
    data = taught.examples(0, {"ann": 5000, "bob": 5})
    data = {"datasets": data, "formatted": data.with_format("torch"), "list": data.to_list()}[form]
    part = own_examples(data, [5004, 5002])
    assert len(pickle.dumps(part)) < 6000
    assert len(part) == 2
    assert [str(part[0][key]) for key in part[0]] == [str(data[5004][key]) for key in data[5004]]
    assert isinstance(part[0]["input_ids"], torch.Tensor if form == "formatted" else list)
