"""The study's fitted pools: made by ``fit_pool`` from the seven seen domains, each a task with a head of its own."""

import functools
import os
import random
import tempfile

import torch
from datasets import Dataset
from quality_pools import KEPT
from quality_tasks import SEEN, TASKS, Task, base, load
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments, set_seed

from peft_xmask import AdapterPool, BottleneckConfig, fit_pool

WIDTH, STEPS, RATE, HEAD_RATE = 48, 700, 3e-3, 1e-2


@functools.cache
def fitted(size, principal=16):
    """A pool of ``size`` directions: a common adapter in 700 steps, then 100 steps for each domain."""
    where = KEPT / f"fitted-{WIDTH}-{size}-{principal}"
    if not where.is_dir():
        KEPT.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=KEPT) as folder:
            pool = _fit(size, principal)
            pool.save_pretrained(f"{folder}/pool")
            if not where.is_dir():
                os.rename(f"{folder}/pool", where)
    return AdapterPool.from_pretrained(where)


def _fit(size, principal):
    rows, labels = [], 0
    for domain in SEEN:
        parts = load(Task("clinc150", "model", STEPS, TASKS["car"].batch_size, domain))
        rows += [(text, label + labels, domain) for text, label in parts.train]
        labels += len(parts.labels)
    random.Random(1).shuffle(rows)
    tokenizer = AutoTokenizer.from_pretrained(base())
    encoded = tokenizer([text for text, _, _ in rows], truncation=True, max_length=128)
    columns = {"labels": [label for _, label, _ in rows], "domain": [domain for _, _, domain in rows]}
    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base(), num_labels=labels)
    args = TrainingArguments(
        output_dir=str(KEPT / "fitting"), per_device_train_batch_size=TASKS["car"].batch_size, max_steps=STEPS,
        learning_rate=RATE, warmup_steps=42, save_strategy="no", report_to=[], use_cpu=True, seed=0,
    )  # fmt: skip
    found = fit_pool(
        model, Dataset.from_dict({**encoded, **columns}), profile_column="domain", processing_class=tokenizer,
        config=BottleneckConfig(bottleneck_size=WIDTH, task_type="SEQ_CLS"), args=args, size=size,
        principal=principal, group_steps=TASKS["car"].steps, group_learning_rate=RATE, head_learning_rate=HEAD_RATE,
        group_head="own", resume=True, progress=False,
    )  # fmt: skip
    return found.pool


def common_alone(model):
    """Freeze masks at no deviation: what is left is the pool's common part, and the head."""
    for weight in model.masks("default").trained_state().values():
        weight.requires_grad_(False)
    with torch.no_grad():
        model.masks("default").gain.weight.fill_(-1e4)
