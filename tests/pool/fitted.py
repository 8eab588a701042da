"""Tiny tasks and people that a pool can be fitted to. Tests run it as a script, to kill it or in two processes.

``fitted.py FOLDER OUT [resume]`` fits the pool of :func:`fit` and saves it.
"""

import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from peft_xmask import BottleneckConfig, fit_pool

SIZES = dict(
    vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=32, initializer_range=0.4,
)  # fmt: skip
TASKS = ("north", "east", "south", "west")
LABELS = 3  # of each task


def base(num_labels: int = LABELS * len(TASKS)) -> torch.nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES, num_labels=num_labels)).eval()


def tasks(seed: int = 0, each: int = 24, names: tuple[str, ...] = TASKS) -> Dataset:
    """Every task has labels of its own: the first token of a text says which, by another rule in each task."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for ids in torch.randint(1, 60, (each, 6), generator=generator).tolist():
        for number, name in enumerate(names):
            label = LABELS * TASKS.index(name) + (ids[0] // (number + 1)) % LABELS
            rows.append({"input_ids": ids, "attention_mask": [1] * 6, "labels": label, "task": name})
    return Dataset.from_list(rows)


def people(seed: int = 0, each: int = 24) -> Dataset:
    """The same texts, labels 0 to 2; the people draw the line between labels at different tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, name in enumerate(TASKS):
        for ids in torch.randint(1, 60, (each, 6), generator=generator).tolist():
            label = int(ids[0] > 12 + 6 * number) + int(ids[0] > 30 + 6 * number)
            rows.append({"input_ids": ids, "attention_mask": [1] * 6, "labels": label, "task": name})
    return Dataset.from_list(rows)


def arguments(folder: object, **fields: object) -> TrainingArguments:
    settings = dict(
        output_dir=str(folder), num_train_epochs=3, per_device_train_batch_size=8, learning_rate=1e-2, report_to=[],
        save_strategy="no", use_cpu=True, seed=3, logging_strategy="no",
    )  # fmt: skip
    return TrainingArguments(**{**settings, **fields})


def fit(folder: object, **fields: object):
    settings = dict(
        dataset=tasks(), profile_column="task", config=BottleneckConfig(bottleneck_size=4, task_type="SEQ_CLS"),
        size=24, group_steps=10, group_learning_rate=1e-2, progress=False,
    )  # fmt: skip
    args = {"args": arguments(folder)} if "args" not in fields else {}
    return fit_pool(base(), **{**settings, **args, **fields})


if __name__ == "__main__":
    folder, out, *resume = sys.argv[1:]
    args = arguments(folder, save_strategy="steps", save_steps=10)
    rank = int(os.environ.get("RANK", "0"))
    found = fit(folder, args=args, validation=tasks(1, 8), resume=bool(resume))
    found.pool.save_pretrained(Path(out) / str(rank))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
