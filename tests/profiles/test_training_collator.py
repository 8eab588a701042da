"""Rows in the batches of any loop, the plain Trainer's among them."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import BertTokenizerFast, DataCollatorWithPadding, Trainer, default_data_collator

from peft_xmask.errors import ConfigError
from peft_xmask.profiles import ProfileCollator, RowAdamW

spec = importlib.util.spec_from_file_location("taught", Path(__file__).with_name("taught.py"))
taught = importlib.util.module_from_spec(spec)
spec.loader.exec_module(taught)

NAMES = list(taught.COUNTS)


def collator(profiles=NAMES, **fields) -> ProfileCollator:
    return ProfileCollator(default_data_collator, profiles, **fields)


def example(user) -> dict:
    return {"input_ids": [1, 2], "user": user}


def test_names_become_rows_beside_what_the_inner_collator_makes():
    batch = collator()([example(name) for name in ("Zoë", "ann", "__base__", "Zoë")])
    assert batch["adapter_names"].tolist() == [2, 0, -1, 2]
    assert batch["adapter_names"].dtype == torch.long
    assert batch["input_ids"].tolist() == [[1, 2]] * 4
    assert "user" not in batch


@pytest.mark.parametrize("value", [2, -1, torch.tensor(2), np.int64(2)])
def test_row_numbers(value):
    assert collator(4)([example(value)])["adapter_names"].tolist() == [int(value)]


@pytest.mark.parametrize("value", ["nobody", None, "", 2, float("nan"), b"ann", ["ann"]])
def test_unknown_names_are_refused(value):
    with pytest.raises(ConfigError, match=r"one of 4 names, or '__base__'.* in example 1"):
        collator()([example("ann"), example(value)])


@pytest.mark.parametrize("value", ["ann", None, 4, -2, True, 1.0])
def test_unknown_rows_are_refused(value):
    with pytest.raises(ConfigError, match="rows from 0 to 3"):
        collator(4)([example(value)])


def test_a_missing_column_is_refused():
    with pytest.raises(ConfigError, match=r"column 'user'.*\['input_ids'\].*remove_unused_columns=False"):
        collator()([{"input_ids": [1]}])
    with pytest.raises(ConfigError, match="column 'owner'"):
        collator(column="owner")([example("ann")])
    with pytest.raises(ConfigError, match="found 'ann' for rows 0 and 1"):
        collator(["ann", "ann"])
    with pytest.raises(ConfigError, match="at least one row"):
        collator(0)


def trainer(folder, model, profiles=NAMES, data=None, optimizers=(None, None), **fields) -> Trainer:
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(55))]))
    data = data or taught.examples()
    data = data.map(lambda row: {"input_ids": row["input_ids"][: sum(row["attention_mask"])]})
    inner = DataCollatorWithPadding(BertTokenizerFast(str(vocabulary)))
    return Trainer(
        model,
        taught.arguments(folder, **{"remove_unused_columns": False, "disable_tqdm": True, **fields}),
        data_collator=ProfileCollator(inner, profiles, model=model),
        train_dataset=data.remove_columns("attention_mask"),
        eval_dataset=data.remove_columns("attention_mask"),
        optimizers=optimizers,
    )


def rows_of(model) -> torch.Tensor:
    return model.masks("default").logits.weight.detach().clone()


@pytest.mark.parametrize(
    "fields",
    [
        {"eval_strategy": "epoch"},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"train_sampling_strategy": "group_by_length"},
    ],
)
def test_the_plain_trainer_trains_mixed_batches(fields, tmp_path):
    model = get_peft_model(taught.base(), taught.config(num_profiles=5))
    optimizer = RowAdamW.for_model(model, lr=1e-2, weight_decay=0.1)
    run = trainer(tmp_path, model, [*NAMES, "nobody yet"], optimizers=(optimizer, None), **fields)
    before = run.evaluate()["eval_loss"]
    start = rows_of(model)
    run.train()
    assert run.evaluate()["eval_loss"] < before / 2
    moved = (rows_of(model) != start).any(1)
    assert moved.tolist() == [True] * 4 + [False]


def test_its_own_optimizer_trains_too(tmp_path):
    model = get_peft_model(taught.base(), taught.config(num_profiles=4))
    run = trainer(tmp_path, model)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before / 2


def test_columns_that_the_trainer_drops_are_missed_in_words(tmp_path):
    model = get_peft_model(taught.base(), taught.config(num_profiles=4))
    with pytest.raises(ConfigError, match="remove_unused_columns=False"):
        trainer(tmp_path, model, remove_unused_columns=True).train()


def test_an_unknown_name_in_the_data_stops_the_trainer(tmp_path):
    model = get_peft_model(taught.base(), taught.config(num_profiles=4))
    with pytest.raises(ConfigError, match="found 'eve' in example"):
        trainer(tmp_path, model, data=taught.examples(0, {"ann": 2, "eve": 1})).train()
