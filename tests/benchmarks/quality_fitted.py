"""The study's fitted pools: made by ``fit_pool`` from the seven seen domains, each group a task with a head of its own.

On the plain base, or on the base with the merged LoRA of ``quality_common.py``; with a group for each domain, or with
21 groups of five intents each. The control is a random pool around the same common part.
"""

import functools
import os
import random
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from quality_common import common_base
from quality_pools import KEPT, sites_of, written
from quality_tasks import SEEN, TASKS, Task, base, load
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments, set_seed

from peft_xmask import AdapterPool, BottleneckConfig, fit_pool

WIDTH, STEPS, RATE, HEAD_RATE = 48, 700, 3e-3, 1e-2
FEW_INTENTS = 5


@functools.cache
def fitted(size, grouped="domains", merged=False):
    """A pool of ``size`` directions: a common adapter in 700 steps, then 100 steps for each group."""
    where = KEPT / f"fitted-{WIDTH}-{size}-{grouped}{'-merged' if merged else ''}"
    if not where.is_dir():
        KEPT.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=KEPT) as folder:
            _fit(size, grouped, common_base() if merged else base(), folder).save_pretrained(f"{folder}/pool")
            if not where.is_dir():
                os.rename(f"{folder}/pool", where)
    return AdapterPool.from_pretrained(where)


@functools.cache
def random_around(size, width):
    """The control: random directions around the common part of :func:`fitted`."""
    sites = sites_of(fitted(size), common=True)
    kept = {site: {part: tensor[0] for part, tensor in parts.items()} for site, parts in sites.items()}
    with tempfile.TemporaryDirectory() as folder:
        [adapter] = written(Path(folder), WIDTH, [kept])
        return AdapterPool.random(size, width).with_common(adapter)


def _fit(size, grouped, where, folder):
    rows, labels = [], 0
    for domain in SEEN:
        parts = load(Task("clinc150", "model", STEPS, TASKS["car"].batch_size, domain))
        rows += [(text, label + labels, domain) for text, label in parts.train]
        labels += len(parts.labels)
    random.Random(1).shuffle(rows)
    order = random.Random(2).sample(range(labels), labels)
    if grouped == "intents":
        rows = [(text, label, str(order.index(label) // FEW_INTENTS)) for text, label, _ in rows]
    tokenizer = AutoTokenizer.from_pretrained(base())
    encoded = tokenizer([text for text, _, _ in rows], truncation=True, max_length=128)
    columns = {"labels": [label for _, label, _ in rows], "group": [group for _, _, group in rows]}
    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(where, num_labels=labels, ignore_mismatched_sizes=True)
    args = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=TASKS["car"].batch_size, max_steps=STEPS,
        learning_rate=RATE, warmup_steps=42, save_strategy="no", report_to=[], use_cpu=True, seed=0,
    )  # fmt: skip
    found = fit_pool(
        model, Dataset.from_dict({**encoded, **columns}), profile_column="group", processing_class=tokenizer,
        config=BottleneckConfig(bottleneck_size=WIDTH, task_type="SEQ_CLS"), args=args, size=size,
        group_steps=TASKS["car"].steps, group_learning_rate=RATE, head_learning_rate=HEAD_RATE, group_head="own",
        progress=False,
    )  # fmt: skip
    return found.pool


def common_alone(model):
    """Freeze masks at no deviation: what is left is the pool's common part, and the head."""
    for weight in model.masks("default").trained_state().values():
        weight.requires_grad_(False)
    with torch.no_grad():
        model.masks("default").gain.weight.fill_(-1e4)
