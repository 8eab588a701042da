"""What the study's seven seen domains share, as controls for pools: one adapter for all of them, and a pool's mean.

The common adapter is one LoRA, trained on all seven at once and merged into the base; tasks called ``...-common`` stand
on that base. It is made when it is first wanted and kept in a folder of the system's temporary directory.
"""

import os
import tempfile

from peft import LoraConfig
from quality_pools import KEPT
from quality_tasks import SEEN, TASKS, Parts, Task, base, load

from peft_xmask.cli.classify import TextClassifier
from peft_xmask.cli.train_settings import TrainSettings

LINEAR_PATTERN = r".*\.layer\.\d+\..*(query|key|value|dense)"
STEPS, RATE = 700, 3e-3


def together():
    """Training texts of the seven seen domains as one task of 105 intents."""
    pairs, labels = [], []
    for domain in SEEN:
        parts = load(Task("clinc150", "model", STEPS, TASKS["car"].batch_size, domain))
        pairs += [(text, label + len(labels)) for text, label in parts.train]
        labels += [f"{domain}: {label}" for label in parts.labels]
    return Parts(pairs, [], [], labels)


def common_base():
    """Folder of the base with the common adapter merged into it: 700 steps of 16 texts, 100 for each domain."""
    where = KEPT / f"common-base-{STEPS}"
    if not where.is_dir():
        KEPT.mkdir(exist_ok=True)
        parts = together()
        config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=LINEAR_PATTERN)
        classifier = TextClassifier.create(base(), parts.labels, config, pooling="model", seed=0)
        settings = TrainSettings(
            max_steps=STEPS, batch_size=TASKS["car"].batch_size, learning_rate=RATE, head_learning_rate=1e-2, seed=0
        )
        classifier.train(parts.train, settings)
        with tempfile.TemporaryDirectory(dir=KEPT) as folder:
            classifier.model.merge_and_unload().base_model.save_pretrained(f"{folder}/base")
            classifier.tokenizer.save_pretrained(f"{folder}/base")
            if not where.is_dir():
                os.rename(f"{folder}/base", where)
    return where


def base_of(task):
    """Folder of the base that a task stands on."""
    return common_base() if task.common else base()
