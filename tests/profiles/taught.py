"""Tiny data that profiles can learn from, and a training of it; run as a script, which a test kills half-way.

Each user gives every text the same label, which is another one for each user: what only a profile can know.
"""

import sys

import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from peft_xmask import XPEFTConfig
from peft_xmask.profiles import train_profiles

SIZES = dict(
    vocab_size=60, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=32, num_labels=4, initializer_range=0.4,
)  # fmt: skip
COUNTS = {"ann": 3, "bob": 20, "Zoë": 9, "张伟": 12}


def base(dropout: float = 0.1) -> torch.nn.Module:
    torch.manual_seed(0)
    rates = dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    return BertForSequenceClassification(BertConfig(**SIZES, **rates)).eval()


def config(**fields) -> XPEFTConfig:
    return XPEFTConfig(**{"task_type": "SEQ_CLS", "num_adapters": 20, "bottleneck_size": 4, "scale": 1.0, **fields})


def examples(seed: int = 0, counts: dict[str, int] | None = None, offset: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for label, (name, count) in enumerate((counts or COUNTS).items()):
        for ids in torch.randint(1, 60, (count, 6), generator=generator).tolist():
            length = 3 + ids[0] % 4
            facts = {"labels": (label + offset) % 4, "user": name, "text": "not for the model"}
            padding = [0] * (6 - length)
            rows.append({"input_ids": ids[:length] + padding, "attention_mask": [1] * length + padding, **facts})
    return Dataset.from_list(rows)


def arguments(folder, **fields) -> TrainingArguments:
    settings = dict(
        output_dir=str(folder), num_train_epochs=6, per_device_train_batch_size=8, learning_rate=1e-2, report_to=[],
        save_strategy="no", logging_steps=5, use_cpu=True, seed=3,
    )  # fmt: skip
    return TrainingArguments(**{**settings, **fields})


def train(folder, resume: bool = False, **fields):
    args = arguments(folder, save_strategy="steps", save_steps=8, save_total_limit=1, num_train_epochs=6)
    return train_profiles(
        base(), args=args, resume=resume, patience=2, progress=False,
        **{"dataset": examples(), "validation": examples(1), "config": config(), **fields},
    )  # fmt: skip


if __name__ == "__main__":
    train(sys.argv[1], resume=False).save_pretrained(sys.argv[2])
