"""train_profiles: what is learnt, what is kept, what stays as it is, and what is refused."""

import dataclasses
import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import concatenate_datasets
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from peft_xmask import ProfileTraining, XPEFTConfig, train_profiles
from peft_xmask.core.examples import fingerprint_examples
from peft_xmask.errors import BaseMismatchError, ConfigError
from peft_xmask.profiles import ProfileBank
from peft_xmask.training.checkpoints import STATE_FILE

SCRIPT = Path(__file__).with_name("taught.py")
spec = importlib.util.spec_from_file_location("taught", SCRIPT)
taught = importlib.util.module_from_spec(spec)
spec.loader.exec_module(taught)

HEAD = "base_model.model.classifier.weight"


def fit(folder, **fields):
    settings = {"validation": taught.examples(1), "config": taught.config(), "args": taught.arguments(folder)}
    return train_profiles(taught.base(), taught.examples(), **{"progress": False, **settings, **fields})


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A bank in memory."""
    return fit(tmp_path_factory.mktemp("first"))


def accuracy(bank: ProfileBank, data) -> dict[str, float]:
    """Of each profile on its own examples, served by name in one batch."""
    served = bank.attach(taught.base())
    batch = {key: torch.tensor(data[key]) for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        found = served(**batch, adapter_names=data["user"][:]).logits.argmax(-1)
    right, names = found == torch.tensor(data["labels"]), data["user"][:]
    return {name: float(right[[each == name for each in names]].float().mean()) for name in set(names)}


@pytest.mark.parametrize("head", ["joint", "frozen", "first"])
def test_profiles_learn_what_is_theirs(head, tmp_path):
    steps = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4} if head == "first" else {}
    bank = fit(tmp_path / "out", head=head, args=taught.arguments(tmp_path / "out", **steps))
    assert list(bank) == list(taught.COUNTS)
    bank.save_pretrained(tmp_path / "bank")
    found = accuracy(ProfileBank.from_pretrained(tmp_path / "bank"), taught.examples(2))
    assert sum(found.values()) / len(found) > 0.7, found
    before = taught.base().classifier.weight
    assert torch.equal(bank.shared[HEAD], before) == (head == "frozen")
    assert bank.metrics["ann"]["examples"] == 3
    assert all(0 < facts["validation_loss"] < 1.3 for facts in bank.metrics.values())
    assert json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8")) == bank.metrics


def losses(bank: ProfileBank, data) -> dict[str, float]:
    """Mean loss of each profile on its own examples."""
    served = bank.attach(taught.base())
    batch = {key: torch.tensor(data[key]) for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        found = served(**batch, adapter_names=data["user"][:]).logits
    each = torch.nn.functional.cross_entropy(found, torch.tensor(data["labels"]), reduction="none")
    return {name: float(each[[user == name for user in data["user"]]].mean()) for name in bank}


def test_a_kept_row_is_the_best_by_validation(tmp_path):
    """With other labels for validation the best row is an early one: training goes on, and the early row is kept."""
    validation = taught.examples(1, offset=2)
    bank = fit(tmp_path, validation=validation, head="frozen", patience=None)
    last = fit(tmp_path, validation=None, head="frozen")
    kept = losses(bank, validation)
    assert kept == pytest.approx({name: bank.metrics[name]["validation_loss"] for name in bank}, abs=1e-4)
    assert all(loss > kept[name] + 0.1 for name, loss in losses(last, validation).items())
    assert all(facts["stopped_step"] is None for facts in bank.metrics.values())


def test_a_row_that_does_not_help_is_not_kept(tmp_path):
    """Served by name, ann is answered by the base; the others are not."""
    data = taught.examples(1).map(lambda row: {"labels": 3 if row["user"] == "ann" else row["labels"]})
    bank = fit(tmp_path, validation=data, head="frozen", args=taught.arguments(tmp_path, num_train_epochs=40))
    served = bank.attach(taught.base())
    batch = {"input_ids": torch.tensor(taught.examples()["input_ids"][:4])}
    with torch.no_grad():
        base = served(**batch, adapter_names=["__base__"] * 4).logits
        ann, bob = (served(**batch, adapter_names=[name] * 4).logits for name in ("ann", "bob"))
    assert bank.metrics["ann"]["layers"] == []
    assert bank.metrics["bob"]["layers"] == ["mask"]
    assert torch.equal(ann, base)
    assert not torch.equal(bob, base)


def test_patience_stops_a_profile_that_does_not_improve(tmp_path):
    bank = fit(tmp_path, validation=taught.examples(1, offset=2), head="frozen", patience=2)
    for facts in bank.metrics.values():
        assert facts["stopped_step"] == facts["best_step"] + 2 * 6


def test_others_do_not_notice_who_stops(tmp_path):
    """One profile with validation that goes wrong at once; the rest train as if it had gone on."""
    wrong = taught.examples(1, {"ann": 4}, offset=2)
    settings = dict(head="frozen", patience=1, config=taught.config(), args=taught.arguments(tmp_path), progress=False)
    stopped = train_profiles(taught.base(dropout=0.0), taught.examples(), validation=wrong, **settings)
    alone = train_profiles(taught.base(dropout=0.0), taught.examples(), **settings)
    assert stopped.metrics["ann"]["stopped_step"] is not None
    for name in ("bob", "Zoë", "张伟"):
        same = stopped[name].selected(stopped.spec) == alone[name].selected(alone.spec)
        assert same.float().mean() > 0.97  # batches of other sizes round otherwise
        assert stopped.metrics[name]["validation_loss"] is None


def test_new_profiles_join_a_bank_and_leave_the_others_alone(first, tmp_path):
    first.save_pretrained(tmp_path / "bank")
    bank = ProfileBank.from_pretrained(tmp_path / "bank")
    newcomers = taught.examples(5, {"dan": 4, "eve": 14})
    joined = train_profiles(
        taught.base(),
        newcomers,
        bank=bank,
        args=taught.arguments(tmp_path / "more", num_train_epochs=12),
        progress=False,
    )
    assert list(joined) == [*taught.COUNTS, "dan", "eve"]
    assert list(joined.metrics) == ["dan", "eve"]
    assert list(bank) == list(taught.COUNTS)
    joined.save_pretrained(tmp_path / "joined")
    after = ProfileBank.from_pretrained(tmp_path / "joined")
    for name in taught.COUNTS:
        assert after[name] == first[name]
    assert torch.equal(after.shared[HEAD], first.shared[HEAD])
    found = accuracy(after, taught.examples(6, {"dan": 8, "eve": 8}))
    assert sum(found.values()) / 2 > 0.7, found


def test_a_profile_of_the_bank_goes_on_from_its_masks(first, tmp_path):
    again = train_profiles(
        taught.base(), taught.examples(7, {"bob": 8}), bank=first, progress=False,
        args=taught.arguments(tmp_path, num_train_epochs=1, per_device_train_batch_size=8), mask_learning_rate=1e-6,
    )  # fmt: skip
    assert all(again[name] == first[name] for name in first)


def test_a_killed_run_goes_on_to_the_very_same_bank(tmp_path):
    whole = taught.train(tmp_path / "whole")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(tmp_path / "killed"), str(tmp_path / "never")],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while not list((tmp_path / "killed").glob(f"checkpoint-16/{STATE_FILE}")):
        assert process.poll() is None, process.stderr.read().decode()[-3000:]
        assert time.monotonic() < deadline, "no checkpoint in ten minutes"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "never").exists()
    broken = tmp_path / "killed" / "checkpoint-999"  # as of a process that died while it wrote
    broken.mkdir()
    (broken / "trainer_state.json").write_text("{")
    resumed = taught.train(tmp_path / "killed", resume=True)
    assert resumed.metrics == whole.metrics
    for bank, name in ((whole, "a"), (resumed, "b")):
        bank.save_pretrained(tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        if path.suffix in (".safetensors", ".json"):
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    taught.train(tmp_path)
    with pytest.raises(ConfigError, match=r"sampling_temperature=2\.0"):
        taught.train(tmp_path, resume=True, sampling_temperature=1.0)
    with pytest.raises(ConfigError, match="adapter="):
        taught.train(tmp_path, resume=True, config=taught.config(pool_seed=5))


@pytest.mark.parametrize("what", ["labels", "text", "order", "validation"])
def test_other_data_is_another_run(what, tmp_path):
    """Neither continued nor written over: the error shows both fingerprints."""
    taught.train(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    data, validation = taught.examples(), taught.examples(1)
    changed = {
        "labels": lambda: data.map(lambda row: {"labels": 3 - row["labels"]}),
        "text": lambda: data.map(lambda row: {"input_ids": [*row["input_ids"][:-1], 59]}),
        "order": lambda: data.select([1, 0, *range(2, len(data))]),
        "validation": lambda: validation.map(lambda row: {"labels": 3 - row["labels"]}),
    }[what]()
    fields = {"validation": changed} if what == "validation" else {"dataset": changed}
    name = "validation" if what == "validation" else "examples"
    for resume, advice in ((True, "pass the same data"), (False, "another output_dir")):
        with pytest.raises(ConfigError, match=rf"{name}='[0-9a-f]{{16}}' \(this run has '[0-9a-f]{{16}}'\).*{advice}"):
            taught.train(tmp_path, resume=resume, **fields)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    taught.train(tmp_path)


def test_examples_have_one_fingerprint_however_they_are_held():
    data = taught.examples()
    found = fingerprint_examples(data)
    assert fingerprint_examples(data.to_list()) == found
    assert fingerprint_examples(data.with_format("torch")) == found
    assert fingerprint_examples([{**row, "input_ids": torch.tensor(row["input_ids"])} for row in data]) == found
    assert fingerprint_examples(data.select(range(len(data) - 1))) != found
    assert fingerprint_examples(data.rename_column("user", "person")) != found
    assert fingerprint_examples(data.to_list() * 60) == fingerprint_examples(concatenate_datasets([data] * 60))


def test_settings_are_one_object(tmp_path):
    settings = ProfileTraining(config=taught.config(), args=taught.arguments(tmp_path), head="frozen", patience=1)
    there = pickle.loads(pickle.dumps(settings)).resolved(joins_bank=False, folder="unused")
    assert there.identity() == settings.resolved(joins_bank=False, folder="unused").identity()
    first = train_profiles(taught.base(), taught.examples(), settings, progress=False)
    again = train_profiles(taught.base(), taught.examples(), progress=False, head="frozen", patience=1,
                           config=taught.config(), args=taught.arguments(tmp_path / "again"))  # fmt: skip
    assert all(first[name] == again[name] for name in first)
    with pytest.raises(ConfigError, match="Unknown settings: heads"):
        train_profiles(taught.base(), taught.examples(), settings, heads="joint")
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.head = "joint"


def test_user_ids_may_be_numbers(tmp_path):
    numbers = {name: number for number, name in enumerate(taught.COUNTS)}
    data = [{**row, "user": numbers[row["user"]]} for row in taught.examples()]
    bank = train_profiles(taught.base(), data, config=taught.config(), args=taught.arguments(tmp_path), progress=False)
    assert list(bank) == ["0", "1", "2", "3"]


def test_an_adapter_with_rows_of_its_own(tmp_path):
    model = get_peft_model(taught.base(), taught.config(num_profiles=4, mask_type="soft", learn_gain=False))
    bank = train_profiles(model, taught.examples(), args=taught.arguments(tmp_path), progress=False)
    assert isinstance(model, PeftModel)
    assert bank.spec.mask_type == "soft"
    assert len(bank) == 4
    other = get_peft_model(taught.base(), taught.config(num_profiles=3))
    with pytest.raises(ConfigError, match="num_profiles=4"):
        train_profiles(other, taught.examples(), args=taught.arguments(tmp_path))


def test_a_language_model_without_a_head(tmp_path):
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.4))
    data = taught.examples()
    data = data.map(lambda row: {"labels": [7 if row["user"] == "bob" else 8] * 6})
    batch = {key: torch.tensor(data[key]) for key in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        before = float(model(**batch).loss)
    config = XPEFTConfig(task_type="CAUSAL_LM", num_adapters=20, bottleneck_size=8, scale=3.0)
    bank = train_profiles(
        model, data, validation=data, config=config, args=taught.arguments(tmp_path, learning_rate=1e-2), progress=False
    )
    assert bank.shared == {}
    assert max(facts["validation_loss"] for facts in bank.metrics.values()) < 0.8 * before


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"profile_column": "owner"}, "column 'owner'"),
        ({"validation": taught.examples(1, {"nobody": 2})}, "'nobody'"),
        ({"head": "none"}, "'joint', 'frozen', 'first'"),
        ({"sampling_temperature": 0.5}, "sampling_temperature=0.5"),
        ({"max_passes": 0}, "max_passes=0"),
        ({"patience": 0}, "patience=0"),
        ({"mask_learning_rate": 0.0}, "mask_learning_rate=0.0"),
        ({"args": TrainingArguments("out", fp16=True, report_to=[], use_cpu=True)}, "fp16"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_computed(fields, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        fit(tmp_path, **fields)


@pytest.mark.parametrize("name", [None, 7.5, True, "", "__base__", "x" * 2000, float("nan")])
def test_names_that_cannot_be(name, tmp_path):
    rows = [dict(row) for row in taught.examples()]
    rows[4]["user"] = name
    with pytest.raises(ConfigError, match="Expected a name"):
        train_profiles(taught.base(), rows, args=taught.arguments(tmp_path))


def test_a_bank_keeps_its_head_and_its_base(first, tmp_path):
    with pytest.raises(ConfigError, match="head='frozen'"):
        fit(tmp_path, config=None, bank=first, head="joint")
    with pytest.raises(ConfigError, match="found both"):
        fit(tmp_path, bank=first)
    other = taught.base()
    with torch.no_grad():
        other.bert.encoder.layer[0].output.dense.weight.neg_()
    with pytest.raises(BaseMismatchError):
        train_profiles(other, taught.examples(), bank=first, args=taught.arguments(tmp_path))
