"""Fitting a pool to tasks and people: what they share, and directions in which they differ."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from launching import in_two_processes
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from peft_xmask import AdapterPool, BottleneckConfig, ProfileBank, XPEFTConfig, export_lora
from peft_xmask.core.masks import hard_mask
from peft_xmask.errors import ConfigError, FileFormatError
from peft_xmask.pool import PoolSlice
from peft_xmask.pool.common import remade
from peft_xmask.pool.directions import mixing_coefficients, principal_directions
from peft_xmask.pool.storage import write_pool
from peft_xmask.pool.trained import SiteTensors

SCRIPT = Path(__file__).with_name("fitted.py")
spec = importlib.util.spec_from_file_location("fitted", SCRIPT)
fitted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fitted)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return fitted.fit(tmp_path_factory.mktemp("fitted"))


@pytest.fixture
def saved(found, tmp_path) -> Path:
    found.pool.save_pretrained(tmp_path / "pool")
    return tmp_path / "pool"


def logits(model: torch.nn.Module, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(1, 19).view(3, 6), **kwargs).logits


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("size", [24, 101])
def test_the_first_mask_is_no_deviation_and_a_gradient_reaches_as_far_as_groups_do(size):
    coefficients = mixing_coefficients(size, 5, seed=1)
    start = hard_mask(torch.zeros(size), size // 2, estimator="straight_through", weighting="signed")
    assert (start @ coefficients).abs().max() < 1e-6
    generator = torch.Generator().manual_seed(0)
    reached = []
    for _ in range(50):
        wanted = torch.randn(5, generator=generator)
        mask = hard_mask(coefficients @ wanted, size // 2, estimator="straight_through", weighting="signed")
        own = mask @ coefficients
        assert torch.cosine_similarity(own, wanted, dim=0) > 0.7
        reached.append(own.norm())
    assert torch.stack(reached).mean() == pytest.approx(5**0.5, rel=0.15)


def test_principal_directions_are_as_long_as_the_standard_deviation():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([5.0, 2.0, 0.5])
    axes = torch.linalg.qr(torch.randn(40, 3, generator=generator)).Q
    values = (torch.randn(300, 3, generator=generator) * sizes) @ axes.T
    directions = principal_directions(values - values.mean(0), 4)
    torch.testing.assert_close(directions[:3].norm(dim=1), sizes, rtol=0.15, atol=0)
    torch.testing.assert_close((directions[:3] @ axes).abs().diagonal(), sizes, rtol=0.15, atol=0)
    assert not directions[3].any()


def test_profiles_start_at_the_common_part(found):
    pool = found.pool
    assert (pool.num_adapters, pool.mask_weighting, pool.fitting.principal) == (24, "signed", 3)
    model = get_peft_model(fitted.base(), XPEFTConfig(pool=pool, num_profiles=3, task_type="SEQ_CLS"))
    common = logits(model, adapter_names=torch.full((3,), -1))
    torch.testing.assert_close(logits(model, adapter_names=torch.arange(3)), common, atol=1e-5, rtol=1e-5)
    weight = model.base_model.table.xpeft_logits["default"].weight
    with torch.no_grad():
        weight.normal_(generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(logits(model, adapter_names=torch.arange(3)), common, atol=1e-2)


def test_a_gain_of_zero_is_the_common_part(found):
    """Of a mask that was dropped because it did not help."""
    model = get_peft_model(fitted.base(), XPEFTConfig(pool=found.pool, num_profiles=3, task_type="SEQ_CLS"))
    masks = model.base_model.table.adapters["default"]
    with torch.no_grad():
        masks.logits.weight.normal_(generator=torch.Generator().manual_seed(0))
        masks.gain.weight.fill_(-1e6)
    common = logits(model, adapter_names=torch.full((3,), -1))
    assert torch.equal(logits(model, adapter_names=torch.arange(3)), common)


def test_the_common_part_has_learnt_what_people_share(tmp_path):
    """Below the head that was trained with it."""
    shared = fitted.fit(tmp_path, dataset=fitted.people(), args=fitted.arguments(tmp_path, num_train_epochs=15))
    data = fitted.people(1)
    batch = {"input_ids": torch.tensor(data["input_ids"]), "labels": torch.tensor(data["labels"])}
    model = fitted.base()
    with torch.no_grad():
        for name, tensor in shared.head.items():
            model.get_parameter(name).copy_(tensor)
    adapted = get_peft_model(model, XPEFTConfig(pool=shared.pool, task_type="SEQ_CLS", num_profiles=2)).eval()
    with torch.no_grad():
        common = adapted(**batch, adapter_names=torch.full((len(data),), -1)).loss
        with adapted.disable_adapter():
            base = adapted(**batch).loss
    assert common < base - 0.1


def test_tasks_have_heads_of_their_own_and_people_share_one(found, tmp_path):
    assert found.pool.fitting.facts["group_head"] == "own"
    assert not found.head
    shared = fitted.fit(tmp_path, dataset=fitted.people())
    assert shared.pool.fitting.facts["group_head"] == "shared"
    one = fitted.tasks().map(lambda row: {"labels": row["labels"] // 3})
    with pytest.raises(ConfigError, match="at least two labels in every group"):
        fitted.fit(tmp_path / "one", dataset=one, group_head="own")
    numbers = [{**row, "labels": float(row["labels"])} for row in fitted.people()]
    with pytest.raises(ConfigError, match="expected a class as the label"):
        fitted.fit(tmp_path / "numbers", dataset=numbers, group_head="own")


def test_who_is_held_out_plays_no_part(tmp_path):
    data = fitted.tasks()
    other = data.map(lambda row: {"input_ids": [7] * 6} if row["task"] == "west" else {})
    without = data.filter(lambda row: row["task"] != "west")
    pools = []
    for number, (dataset, held_out) in enumerate([(data, ["west"]), (other, ["west"]), (without, [])]):
        found = fitted.fit(tmp_path / str(number), dataset=dataset, held_out=held_out)
        assert found.groups == ("north", "east", "south")
        found.pool.save_pretrained(tmp_path / f"pool{number}")
        pools.append(files(tmp_path / f"pool{number}"))
    assert pools[0] == pools[1]
    assert pools[0]["pool.safetensors"] == pools[2]["pool.safetensors"]
    with pytest.raises(ConfigError, match="found others: 'wset'"):
        fitted.fit(tmp_path, held_out=["wset"])


def test_the_base_is_not_modified(tmp_path):
    model = fitted.base()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    pool = AdapterPool.fit(
        model, fitted.people(), profile_column="task", args=fitted.arguments(tmp_path), size=8, group_steps=2,
        config=BottleneckConfig(bottleneck_size=4, task_type="SEQ_CLS"), progress=False,
    )  # fmt: skip
    assert pool.fitting.principal == 3
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_only_the_largest_groups_get_adapters(tmp_path):
    data = fitted.tasks()
    few = data.filter(lambda row, place: row["task"] != "north" or place < 8, with_indices=True)
    assert fitted.fit(tmp_path / "few", dataset=few).groups == ("east", "south", "west")
    assert len(fitted.fit(tmp_path / "two", max_groups=2).groups) == 2
    with pytest.raises(ConfigError, match="at least two people or tasks with 1000 examples"):
        fitted.fit(tmp_path, min_examples=1000)


def test_what_it_was_fitted_to_is_saved_and_on_the_card(found, saved):
    again = AdapterPool.from_pretrained(saved)
    assert again == found.pool
    assert again.fitting.facts == found.pool.fitting.facts
    assert torch.equal(again.fitting.coefficients, found.pool.fitting.coefficients)
    assert AdapterPool.from_pretrained(saved, dtype=torch.bfloat16).fitting.coefficients.dtype == torch.float32
    card = (saved / "README.md").read_text()
    for line in ("| column | task |", "| groups | 4 |", "| group head | own |", f"| torch | {torch.__version__} |"):
        assert line in card


def test_the_file_has_the_principal_directions_not_their_mixtures(found, saved, tmp_path):
    """However many directions a pool has: of 100 times the size, only the coefficients grow."""
    larger = fitted.fit(tmp_path / "larger", size=2400).pool
    larger.save_pretrained(tmp_path / "large")
    tensors = load_file(saved / "pool.safetensors")
    assert {len(tensor) for name, tensor in tensors.items() if not name.startswith(("common", "prior"))} == {3}
    sizes = [(folder / "pool.safetensors").stat().st_size for folder in (saved, tmp_path / "large")]
    assert sizes[1] - sizes[0] < 4 * 3 * 2376 + 100
    model = get_peft_model(fitted.base(), XPEFTConfig(pool=larger, task_type="SEQ_CLS"))
    held = sum(
        buffer.nbytes for name, buffer in model.named_buffers() if ".pool." in name and "coefficients" not in name
    )
    assert held == 4 * found.pool.common.adapter.nbytes


def test_a_pool_that_was_saved_with_all_of_its_directions_loads(found, tmp_path):
    """As format version 3 did."""
    pool = found.pool
    by = pool.fitting.coefficients
    sites = {
        name: SiteTensors(
            **{part: (by @ tensor.flatten(1)).unflatten(1, tensor.shape[1:]) for part, tensor in site.parts()}
        )
        for name, site in pool._adapters.sites.items()
    }
    dense = remade(pool._adapters, sites, pool._adapters.sources, mask_weighting="signed")
    write_pool(tmp_path, replace(dense, coefficients=None), pool.common, pool.fitting)
    assert json.loads((tmp_path / "pool.json").read_text())["format_version"] == 3
    again = AdapterPool.from_pretrained(tmp_path)
    answers = []
    for each in (pool, again):
        model = get_peft_model(fitted.base(), XPEFTConfig(pool=each, num_profiles=3, task_type="SEQ_CLS"))
        with torch.no_grad():
            model.base_model.table.xpeft_logits["default"].weight.normal_(generator=torch.Generator().manual_seed(0))
        answers.append(logits(model, adapter_names=torch.arange(3)))
    torch.testing.assert_close(*answers, atol=1e-5, rtol=1e-5)


def test_a_cast_model_starts_at_the_common_part(found):
    """Coefficients that are rounded would not cancel."""
    model = get_peft_model(fitted.base(), XPEFTConfig(pool=found.pool, num_profiles=3, task_type="SEQ_CLS")).bfloat16()
    part = next(
        module for module in model.modules() if isinstance(module, PoolSlice) and module.coefficients is not None
    )
    assert (part.coefficients.dtype, part.down.dtype) == (torch.float32, torch.bfloat16)
    common = logits(model, adapter_names=torch.full((3,), -1))
    torch.testing.assert_close(logits(model, adapter_names=torch.arange(3)), common, atol=1e-5, rtol=1e-5)


def moved(pool: AdapterPool, **fields: object):
    """A model with four profiles that deviate."""
    config = XPEFTConfig(pool=pool, num_profiles=4, task_type="SEQ_CLS", **fields)
    model = get_peft_model(fitted.base(), config).eval()
    with torch.no_grad():
        for weight in model.masks("default").trained_state().values():
            weight.normal_(std=0.05, generator=torch.Generator().manual_seed(2))
    return model


def test_threads_get_the_answers_of_their_own_profiles(found):
    """All of them share a bank over the pool, and mix its few directions at the same time."""
    names = ["ann", "bob", "carol", "dan"]
    model = ProfileBank.from_model(moved(found.pool), names).attach(fitted.base()).eval()
    expected = {}
    for name in names:
        model.set_profile(name)
        expected[name] = logits(model)
    assert len({float(each.sum()) for each in expected.values()}) == len(names)

    def asks(number: int) -> bool:
        right = True
        for turn in range(40):
            name = names[(number + turn) % len(names)]
            model.set_profile(name)
            right = right and torch.equal(logits(model), expected[name])
        return right

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(asks, range(8)))


def test_a_profile_is_baked_without_a_model(tmp_path):
    """Of a linear pool: with the common part, and the same numbers as an export from the model."""
    config = BottleneckConfig(bottleneck_size=4, activation="identity", use_bias=False, task_type="SEQ_CLS")
    fitted.fit(tmp_path / "run", config=config).pool.save_pretrained(tmp_path / "pool")
    fitted.base().save_pretrained(tmp_path / "base")
    model = moved(AdapterPool.from_pretrained(tmp_path / "pool"))
    baked = dict(ProfileBank.from_model(model, list("abcd")).to_lora(list("abcd"), tmp_path / "base"))
    for row, name in enumerate("abcd"):
        model.set_profile(row)
        export_lora(model, tmp_path / name)
        exported = load_file(tmp_path / name / "adapter_model.safetensors")
        assert exported.keys() == baked[name].tensors.keys()
        assert all(torch.equal(baked[name].tensors[key], exported[key]) for key in exported)


def test_damage_is_refused(saved, edit_json):
    fitting = json.loads((saved / "pool.json").read_text())["fitting"]
    edit_json(saved / "pool.json", fitting={**fitting, "principal": 2})
    with pytest.raises(FileFormatError, match=r"to be \(\(2, 4, 16\), .* found \(\(3, 4, 16\)"):
        AdapterPool.from_pretrained(saved)
    edit_json(saved / "pool.json", fitting={})
    with pytest.raises(FileFormatError, match="principal"):
        AdapterPool.from_pretrained(saved)
    edit_json(saved / "pool.json", fitting=..., format_version=2)
    with pytest.raises(FileFormatError, match=r"to be \(\(24, 4, 16\), .* found \(\(3, 4, 16\)"):
        AdapterPool.from_pretrained(saved)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """The pool of a run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    done = subprocess.run([sys.executable, SCRIPT, folder / "run", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return files(folder / "0")


@pytest.mark.parametrize("reached", ["common/checkpoint-20/profiles_training_state.safetensors", "group-*"])
def test_a_killed_run_continues_to_the_same_bytes(reached, whole, tmp_path):
    """Killed while the common part is trained, and while the groups are."""
    command = [sys.executable, SCRIPT, tmp_path / "run", tmp_path / "pool"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while not list((tmp_path / "run" / "fitting").glob(reached)):
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "pool" / "0").exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "fitting").glob("*.safetensors")}
    done = subprocess.run([*command, "resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert files(tmp_path / "pool" / "0") == whole


def test_the_files_of_another_run_are_refused(tmp_path):
    fitted.fit(tmp_path)
    with pytest.raises(ConfigError, match=r"of another run, fitted with group_steps=10 \(this run has 11\)"):
        fitted.fit(tmp_path, group_steps=11, resume=True)


def test_two_processes_get_the_same_pool(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = in_two_processes(SCRIPT, tmp_path / "run", tmp_path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert files(tmp_path / "0") == files(tmp_path / "1")
    done = subprocess.run([*command, "resume"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert files(tmp_path / "0") == files(tmp_path / "1")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 3}, "size=3 is invalid"),
        ({"group_head": "both"}, "group_head='both' is invalid"),
        ({"group_learning_rate": 0}, "group_learning_rate=0 is invalid"),
        ({"groups": 3}, "Unknown settings: groups"),
        ({"profile_column": "nobody"}, "Expected a column 'nobody'"),
    ],
)
def test_what_cannot_be_fitted_is_refused(fields, message, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(message)):
        fitted.fit(tmp_path, **fields)


def test_real_domains_on_the_real_minilm(minilm, shared_data, tmp_path):
    """Three domains of clinc150, few steps; a fourth is held out and a profile is trained on it over the pool."""
    import gzip

    with gzip.open(shared_data / "clinc150" / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    domains = ("banking", "travel", "utility", "work")
    kept = [row for domain in domains for row in [each for each in rows if each["domain"] == domain][::12]]
    numbers = {label: number for number, label in enumerate(sorted({row["label"] for row in kept}))}
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    texts = tokenizer([row["text"] for row in kept], truncation=True, max_length=32)
    columns = {"labels": [numbers[row["label"]] for row in kept], "domain": [row["domain"] for row in kept]}
    data = Dataset.from_dict({**texts, **columns}).shuffle(seed=0)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=len(numbers))
    pool = AdapterPool.fit(
        model, data, profile_column="domain", held_out=["work"], size=40, group_steps=4, processing_class=tokenizer,
        config=BottleneckConfig(bottleneck_size=8, task_type="SEQ_CLS"), progress=False,
        args=fitted.arguments(tmp_path, num_train_epochs=1, learning_rate=3e-3),
    )  # fmt: skip
    assert pool.fitting.facts["people or tasks"] == 3
    assert pool.fitting.facts["group_head"] == "own"
    adapted = get_peft_model(model, XPEFTConfig(pool=pool, task_type="SEQ_CLS")).train()
    masks = adapted.base_model.table.adapters["default"]
    batch = tokenizer([row["text"] for row in kept if row["domain"] == "work"][:16], padding=True, return_tensors="pt")
    labels = torch.tensor([numbers[row["label"]] for row in kept if row["domain"] == "work"][:16])
    adapted(**batch, labels=labels).loss.backward()
    assert masks.logits.weight.grad.abs().max() > 0
