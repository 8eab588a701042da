"""train_profiles in two real processes with gloo, started by ``accelerate launch``, against one process."""

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from launching import in_two_processes
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("together.py")
spec = importlib.util.spec_from_file_location("together", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch is built without gloo",
)


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    """What two processes did: a folder for each, and those of the runs."""
    folder = tmp_path_factory.mktemp("together")
    done = subprocess.run(
        in_two_processes(SCRIPT, folder),
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


def facts_of(together: Path, rank: int) -> dict:
    return json.loads((together / f"rank{rank}" / "facts.json").read_text(encoding="utf-8"))


def of_rank(together: Path, rank: int, run: str) -> dict[str, torch.Tensor]:
    return load_file(together / f"rank{rank}" / f"{run}.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_there_were_two_processes_that_hold_the_same_bits(together):
    """Rows, head, banks, losses, and who stopped when."""
    first, second = (facts_of(together, rank) for rank in (0, 1))
    assert (first["backend"], first["processes"]) == ("gloo", 2)
    assert first == {**second, "refused": first["refused"]}
    for run in (*script.RUNS, "resumed", "plain"):
        assert same(of_rank(together, 0, run), of_rank(together, 1, run)), run
    for run in script.RUNS:
        for path in (together / "rank0" / run).glob("*.safetensors"):
            assert path.read_bytes() == (together / "rank1" / run / path.name).read_bytes(), path


@pytest.mark.parametrize("run", ["joint", "frozen", "first"])
def test_they_train_what_one_process_does(run, together, tmp_path):
    expected, bank = script.train(run, tmp_path, 1)
    found = of_rank(together, 0, run)
    assert found.keys() == expected.keys()
    metrics = facts_of(together, 0)[run]
    going = torch.tensor([facts["stopped_step"] is None for facts in bank.metrics.values()])
    for name, value in expected.items():  # of a profile that has stopped, the best row is what counts
        kept = going if "xpeft_" in name else ...
        torch.testing.assert_close(found[name][kept], value[kept], atol=1e-3, rtol=1e-3, msg=name)
    for name in bank:
        for fact, value in bank.metrics[name].items():
            assert metrics[name][fact] == (pytest.approx(value, abs=1e-3) if "loss" in fact else value)


def test_profiles_stop_together(together):
    """Batches of the others, divided among two processes, are among those compared: some are smaller than usual."""
    stopped = {name: facts["stopped_step"] for name, facts in facts_of(together, 0)["frozen"].items()}
    assert stopped["bob"] < 36
    assert stopped["Zoë"] < 36
    assert stopped["ann"] is None


def test_a_plain_trainer_with_our_optimizer_moves_rows_as_one_process_does(together, tmp_path):
    expected, found = script.plain(tmp_path, 1), of_rank(together, 0, "plain")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-3, msg=name)


def test_a_resumed_run_ends_as_the_whole_one(together):
    assert same(of_rank(together, 0, "resumed"), of_rank(together, 0, "hard"))
    facts = facts_of(together, 0)
    assert facts["resumed"] == facts["hard"]


def test_one_process_goes_on_where_two_were(together, tmp_path):
    script.half_way(together / "joint", tmp_path / "alone")
    found, bank = script.train("joint", tmp_path / "alone", 1, resume=True)
    for name, value in of_rank(together, 0, "joint").items():
        torch.testing.assert_close(found[name], value, atol=1e-3, rtol=1e-3, msg=name)
    steps = {name: facts["best_step"] for name, facts in bank.metrics.items()}
    assert steps == {name: facts["best_step"] for name, facts in facts_of(together, 0)["joint"].items()}


def test_processes_that_do_not_have_the_same_are_refused(together):
    for rank in (0, 1):
        assert f"Process {rank} of 2" in facts_of(together, rank)["refused"]
        assert "Expected the same base, profiles and settings" in facts_of(together, rank)["refused"]


def test_the_first_process_writes(together):
    for run in script.RUNS:
        assert (together / run / "metrics.json").is_file()
        assert (together / run / "checkpoint-6" / "profiles_training_state.safetensors").is_file()
    assert not list(together.rglob("*.tmp"))
