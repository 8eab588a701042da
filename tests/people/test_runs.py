"""Runs that are killed, divided among workers, given a pool, or out of disk."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from peft_xmask import AdapterPool, ProfileBank
from peft_xmask.people.personalize import personalize
from peft_xmask.people.predictor import Predictor
from peft_xmask.people.settings import PersonalizeSettings

HOLD = 240  # seconds after which a test that hangs gives up
TEXT = "western number 3"


def command(base: Path, data: Path, out: Path, *more: object) -> list[str]:
    columns = ["--label", "rating", "--who", "who", "--task", "regression"]
    sizes = ["--max-length", "16", "--num-adapters", "16", "--layers", "1", "--epochs", "3"]
    fixed = [sys.executable, "-m", "peft_xmask.cli", "personalize", "--base", base, "--data", data, "--out", out]
    return [*map(str, fixed), *columns, *sizes, *map(str, more)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_a_killed_run_is_resumed_to_the_same_bytes(minilm, people_file, tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    subprocess.run(command(minilm, people_file, tmp_path / "whole" / "bank"), check=True, timeout=HOLD)
    out, again = tmp_path / "killed" / "bank", command(minilm, people_file, tmp_path / "killed" / "bank", "--resume")
    process = subprocess.Popen(again, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + HOLD
    while not any((tmp_path / "killed" / "bank-run").glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait(HOLD)
    assert not out.exists()
    subprocess.run(again, check=True, timeout=HOLD)
    assert contents(out) == contents(tmp_path / "whole" / "bank")
    assert not (tmp_path / "killed" / "bank-run").exists()


def test_a_full_disk_leaves_the_old_bank(minilm, people_file, personalized, tmp_path):
    out = tmp_path / "bank"
    shutil.copytree(personalized[0], out)
    before = contents(out)

    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    done = subprocess.run(
        command(minilm, people_file, out, "--replace", "--epochs", "0"),
        preexec_fn=no_room, capture_output=True, text=True, timeout=HOLD, check=False,
    )  # fmt: skip
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stderr
    assert "error:" in done.stderr
    assert contents(out) == before
    assert Predictor.from_pretrained(out).predict([TEXT], "ann")[0].personal


def test_two_workers_train_half_of_the_people_each(minilm, people_table, small, personalized, tmp_path):
    pytest.importorskip("ray", reason="a fleet needs ray")
    done = personalize(minilm, people_table, tmp_path / "bank", small, ray=2)
    assert set(done.bank) == set(personalized[1].bank)
    ours, theirs = ({layer.name: layer.overall for layer in each.report.layers} for each in (done, personalized[1]))
    assert ours["+ offset"] == pytest.approx(theirs["+ offset"], abs=1e-3)
    answers = Predictor.from_pretrained(tmp_path / "bank").predict([TEXT] * 2, ["ann", "bob"])
    assert answers[0].value > answers[1].value + 2


def test_a_pools_common_part_is_under_the_head(minilm, people_table, small, tmp_path):
    """The head is fitted to states that the common adapter has changed, and the answers are those of that model."""
    from peft import get_peft_model
    from transformers import AutoModel

    from peft_xmask import BottleneckConfig

    torch.manual_seed(0)
    sizes = dict(bottleneck_size=8, layers_to_transform=[5], use_bias=False, init_weights=False)
    common = get_peft_model(AutoModel.from_pretrained(minilm), BottleneckConfig(**sizes))
    pool = AdapterPool.random(16, 4, 0).with_common(common)
    settings = PersonalizeSettings(**{**small.__dict__, "epochs": 0.0})
    done = personalize(minilm, people_table, tmp_path / "bank", settings, pool=pool)
    assert done.bank.config.pool_fingerprint == pool.fingerprint
    layers = {layer.name: layer.overall for layer in done.report.layers}
    predictor = Predictor.from_pretrained(tmp_path / "bank")
    tested = people_table.parts["test"]
    answers = predictor.predict([each.text for each in tested], [each.who for each in tested])
    errors = [abs(answer.value - each.label) for answer, each in zip(answers, tested, strict=True)]
    assert sum(errors) / len(errors) == pytest.approx(layers["+ offset"], abs=2e-3)
    shutil.move(tmp_path / "bank", tmp_path / "moved")
    moved = Predictor(ProfileBank.from_pretrained(tmp_path / "moved")).predict([TEXT], "ann")[0]
    assert moved == predictor.predict([TEXT], "ann")[0]


def test_a_pool_is_fitted_to_the_people(minilm, people_table, small, tmp_path):
    settings = PersonalizeSettings(**{**small.__dict__, "common_epochs": 2, "group_steps": 4})
    done = personalize(minilm, people_table, tmp_path / "bank", settings, pool="fit")
    (folder,) = (tmp_path / "bank").glob("pool-*")
    pool = AdapterPool.from_pretrained(folder)
    assert (pool.num_adapters, pool.fingerprint) == (16, done.bank.config.pool_fingerprint)
    assert pool.common is not None
    layers = {layer.name: layer.overall for layer in done.report.layers}
    assert layers["+ offset"] < layers["common part"]
    ann, bob, nobody = Predictor.from_pretrained(tmp_path / "bank").predict([TEXT] * 3, ["ann", "bob", None])
    assert bob.value < nobody.value < ann.value
    assert not (tmp_path / "bank-run").exists()


def test_every_unusable_cell_is_named_before_the_base_is_looked_for(tmp_path):
    rows = [{"text": f"text {n}", "label": n, "user": "ann"} for n in range(6)]
    rows[1]["label"], rows[4]["text"] = "x", None
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--base", tmp_path / "no-base", "--out", tmp_path / "out", "--task", "regression"]
    done = subprocess.run(
        [sys.executable, "-m", "peft_xmask.cli", "personalize", "--data", str(path), *map(str, more)],
        capture_output=True, text=True, timeout=HOLD, check=False, env={**os.environ, "COLUMNS": "1000"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "row 2, column 'label': expected a finite number, found 'x'" in done.stderr
    assert "row 5, column 'text': expected a text, found nothing" in done.stderr
    assert list(tmp_path.iterdir()) == [path]
