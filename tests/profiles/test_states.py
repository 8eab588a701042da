"""The cache of states before the first adapted block: it changes what is computed, and not what is learnt."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peft_xmask import XPEFTConfig, train_profiles
from peft_xmask.errors import ConfigError, FileFormatError
from peft_xmask.training.states import DATA_FILE, INDEX_FILE

SCRIPT = Path(__file__).with_name("taught.py")
spec = importlib.util.spec_from_file_location("taught", SCRIPT)
taught = importlib.util.module_from_spec(spec)
spec.loader.exec_module(taught)


def fit(folder, model=None, **fields):
    """A run whose model has no dropout, so that runs with and without a cache can be compared."""
    settings = {
        "dataset": taught.examples(), "validation": taught.examples(1), "progress": False,
        "config": taught.config(layers_to_transform=[2]), "args": taught.arguments(folder, num_train_epochs=3),
    }  # fmt: skip
    return train_profiles(taught.base(0.0) if model is None else model, **{**settings, **fields})


def count_passes(model, number):
    """How often a block of a BERT is run, and in which example-passes."""
    seen = []
    block = model.bert.encoder.layer[number].attention
    block.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    return seen


def far(first, second) -> float:
    """The largest difference between the validation losses of two banks' profiles."""
    return max(abs(first.metrics[n]["validation_loss"] - second.metrics[n]["validation_loss"]) for n in first)


@pytest.mark.parametrize("fields", [{"head": "joint"}, {"head": "first"}, {"offset": True}], ids=str)
def test_a_cache_changes_what_is_computed_and_not_what_is_learnt(fields, tmp_path):
    model = taught.base(0.0)
    skipped, adapted = count_passes(model, 1), count_passes(model, 2)
    cached = fit(tmp_path / "cached", model, cache="auto", **fields)
    plain = fit(tmp_path / "plain", **fields)
    examples = len(taught.examples()) + len(taught.examples(1))
    assert sum(skipped) <= examples + 4  # each once, and a few to see whether they can be kept
    assert sum(adapted) > 3 * examples
    assert far(cached, plain) < 1e-4
    same = [torch.equal(cached[name].bits, plain[name].bits) for name in cached]
    assert sum(same) >= len(same) - 1  # rounding may decide between two adapters


def test_dropout_before_the_first_adapted_block_is_off(tmp_path):
    """The states do not depend on chance: two runs with different seeds of dropout find the same ones."""
    fit(tmp_path / "first", taught.base(0.5), cache=tmp_path / "kept")
    before = (tmp_path / "kept" / "training" / DATA_FILE).read_bytes()
    shutil.rmtree(tmp_path / "kept")
    fit(tmp_path / "second", taught.base(0.5), cache=tmp_path / "kept", args=taught.arguments(tmp_path, seed=8))
    assert (tmp_path / "kept" / "training" / DATA_FILE).read_bytes() == before


def test_a_folder_is_used_again(tmp_path):
    first = fit(tmp_path / "first", cache=tmp_path / "kept")
    model = taught.base(0.0)
    skipped = count_passes(model, 1)
    again = fit(tmp_path / "second", model, cache=tmp_path / "kept")
    assert sum(skipped) <= 12  # the probes
    assert [first[name] for name in first] == [again[name] for name in again]


@pytest.mark.parametrize("what", ["data", "base", "values"])
def test_states_of_another_run_are_refused(what, tmp_path):
    fit(tmp_path / "first", cache=tmp_path / "kept")
    model, fields = taught.base(0.0), {}
    if what == "data":
        fields["dataset"] = taught.examples(5)
    for parameter in model.bert.encoder.layer[0].parameters() if what != "data" else ():
        parameter.data.mul_(-1.0 if what == "base" else 1.5)  # 1.5: no sign changes, so no fingerprint does
    with pytest.raises(ConfigError, match=r"another run: (examples|base)|does not compute from example 0"):
        fit(tmp_path / "second", model, cache=tmp_path / "kept", **fields)


@pytest.mark.parametrize("damage", ["truncated", "no index", "no facts"])
def test_a_damaged_cache(damage, tmp_path):
    first = fit(tmp_path / "first", cache=tmp_path / "kept")
    folder = tmp_path / "kept" / "training"
    if damage == "truncated":
        with (folder / DATA_FILE).open("r+b") as stream:
            stream.truncate(100)
    elif damage == "no index":  # a writer was killed
        (folder / INDEX_FILE).unlink()
        again = fit(tmp_path / "second", cache=tmp_path / "kept")
        assert [first[name] for name in first] == [again[name] for name in again]
        return
    else:
        from safetensors.torch import save_file

        save_file({"starts": torch.zeros(1)}, folder / INDEX_FILE)
    with pytest.raises(FileFormatError, match="Delete"):
        fit(tmp_path / "second", cache=tmp_path / "kept")


def test_a_run_with_a_cache_resumes_to_the_very_same_bank(tmp_path):
    args = {"save_strategy": "steps", "save_steps": 8}
    whole = fit(tmp_path / "whole", args=taught.arguments(tmp_path / "whole", **args), cache="auto")
    part = taught.arguments(tmp_path / "part", **args)
    fit(tmp_path / "part", args=part, cache="auto")
    checkpoints = sorted((tmp_path / "part").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for late in checkpoints[1:]:
        shutil.rmtree(late)
    resumed = fit(tmp_path / "part", args=part, cache="auto", resume=True)
    assert [whole[name] for name in whole] == [resumed[name] for name in resumed]
    with pytest.raises(ConfigError, match="cached=True"):
        fit(tmp_path / "part", args=part, resume=True)


@pytest.mark.parametrize("reason", ["first block", "embeddings"])
def test_nothing_to_keep(reason, tmp_path):
    config = taught.config() if reason == "first block" else taught.config(
        layers_to_transform=[2], modules_to_save=["word_embeddings", "classifier"]
    )  # fmt: skip
    with pytest.raises(ConfigError, match="first adapted"):
        fit(tmp_path / "out", config=config, cache=tmp_path / "kept")
    assert fit(tmp_path / "other", config=config, cache="auto").metrics


def test_a_language_model_padded_on_the_left(tmp_path):
    def base():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=60, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
            initializer_range=0.4, max_position_embeddings=32,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()

    def collate(rows):
        longest = max(len(row["input_ids"]) for row in rows)
        ids, mask, labels = [], [], []
        for row in rows:
            empty = longest - len(row["input_ids"])
            ids.append([0] * empty + row["input_ids"])
            mask.append([0] * empty + [1] * len(row["input_ids"]))
            labels.append([-100] * (empty + 1) + row["input_ids"][1:])  # no token is predicted from padding
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}

    rows = [
        {"user": row["user"], "input_ids": row["input_ids"][: sum(row["attention_mask"])]} for row in taught.examples()
    ]
    config = XPEFTConfig(task_type="CAUSAL_LM", num_adapters=20, scale=1.0, layers_to_transform=[2])
    banks = [
        train_profiles(
            base(), rows, validation=rows, config=config, data_collator=collate, cache=cache, head="frozen",
            args=taught.arguments(tmp_path / str(cache), train_sampling_strategy="group_by_length"), progress=False,
        )
        for cache in (None, "auto")
    ]  # fmt: skip
    assert far(*banks) < 1e-4


def test_grouping_by_length_pads_less_and_draws_the_same(tmp_path):
    rows = [{"input_ids": [1] * (3 + place % 20), "labels": place % 4, "user": "ann"} for place in range(200)]
    padded = {}

    def collate(some):
        longest = max(len(row["input_ids"]) for row in some)
        padded[strategy] = padded.get(strategy, 0) + sum(longest - len(row["input_ids"]) for row in some)
        seen[strategy] = seen.get(strategy, 0) + len(some)
        ids = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in some]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor([row["labels"] for row in some])}

    seen = {}
    for strategy in ("random", "group_by_length"):
        args = taught.arguments(tmp_path / strategy, train_sampling_strategy=strategy, num_train_epochs=1)
        train_profiles(taught.base(), rows, config=taught.config(), args=args, data_collator=collate, progress=False)
    assert seen["random"] == seen["group_by_length"] == 200
    assert padded["group_by_length"] < padded["random"] / 5
