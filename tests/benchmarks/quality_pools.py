"""Pools of the study that are not made from a seed alone: other random draws, and adapters trained on other domains.

A pool is made when it is first wanted and kept in a folder of the system's temporary directory.
"""

import functools
import json
import os
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from quality_tasks import DATA, TASKS, UNSEEN, Task, base, load
from transformers import AutoModel

from peft_xmask import AdapterPool, BottleneckConfig
from peft_xmask.classify import TextClassifier
from peft_xmask.train_settings import TrainSettings

KEPT = Path(tempfile.gettempdir()) / "peft_xmask-quality-pools"
SIZE, WIDTH = 100, 48
STD = 0.1
ADAPTER_SEEDS, LORA_SEEDS = 4, 2  # adapters of each seen domain


def pool_in(name, adapters):
    """The pool called ``name``, made by ``adapters(folder)``, which gives the folders of its adapters."""
    where = KEPT / name
    if not where.is_dir():
        KEPT.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=KEPT) as folder:
            made = Path(folder) / "pool"
            kind = AdapterPool.from_lora if name.startswith("lora") else AdapterPool.from_bottleneck
            kind(adapters(Path(folder))).save_pretrained(made)
            if not where.is_dir():
                os.rename(made, where)
    return AdapterPool.from_pretrained(where)


@functools.cache
def home_made(kind):
    """100 x 48, entries of standard deviation 0.1: "uniform", "orthogonal" rows, or "antithetic" or "centred" ones.

    Antithetic: each adapter comes twice, with up-projections of opposite sign. Centred: the mean over all adapters is
    taken off each, so that a mask of half of them is one of signs: ``sum_i m_i B_i = w / 2 sum_i (+-1) B_i``.
    """

    def adapters(folder):
        model = get_peft_model(AutoModel.from_pretrained(base()), BottleneckConfig(bottleneck_size=WIDTH))
        mean = {}
        if kind == "centred":
            generator = torch.Generator().manual_seed(0)
            draws = [{name: draw(p, kind, generator) for name, p in trained(model)} for _ in range(SIZE)]
            mean = {name: torch.stack([each[name] for each in draws]).mean(0) for name in draws[0]}
        generator = torch.Generator().manual_seed(0)
        made = []
        for number in range(SIZE):
            if kind != "antithetic" or number % 2 == 0:
                drawn = {name: draw(parameter, kind, generator) for name, parameter in trained(model)}
            with torch.no_grad():
                for name, parameter in trained(model):
                    turned = kind == "antithetic" and number % 2 == 1 and "up" in name
                    parameter.copy_(-drawn[name] if turned else drawn[name] - mean.get(name, 0.0))
            made.append(folder / str(number))
            model.save_pretrained(made[-1])
        return made

    return pool_in(f"{kind}-{SIZE}-{WIDTH}", adapters)


def trained(model):
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def draw(parameter, kind, generator):
    """Numbers for a projection; biases are zero."""
    if parameter.dim() == 1:
        return torch.zeros_like(parameter)
    normal = torch.randn(parameter.shape, generator=generator)
    if kind == "uniform":
        return STD * 3**0.5 * (2 * torch.rand(parameter.shape, generator=generator) - 1)
    if kind == "orthogonal":
        square = torch.linalg.qr(normal if normal.shape[0] >= normal.shape[1] else normal.T).Q
        square = square if square.shape == normal.shape else square.T
        return STD * square / square.std()
    return STD * normal


@functools.cache
def trained_adapters(width):
    """Bottleneck adapters of the seven seen domains, four seeds each: 28 of them."""
    config = functools.partial(BottleneckConfig, bottleneck_size=width)
    return pool_in(f"bottleneck-{width}", lambda folder: trained_on_others(folder, config, 3e-3, ADAPTER_SEEDS))


@functools.cache
def trained_loras(rank):
    """LoRAs of the seven seen domains, at the same modules as X-PEFT, two seeds each."""
    config = functools.partial(LoraConfig, r=rank, lora_alpha=2 * rank, target_modules=r".*\.layer\.\d+\.output\.dense")
    return pool_in(f"lora-{rank}", lambda folder: trained_on_others(folder, config, 1e-2, LORA_SEEDS))


def trained_on_others(folder, config, rate, seeds):
    """Folders of adapters, trained as the tasks of the unseen domains are."""
    names = json.loads((DATA / "clinc150" / "domains.json").read_text(encoding="utf-8"))
    steps, batch_size = TASKS["car"].steps, TASKS["car"].batch_size
    made = []
    for domain in names:
        if domain in UNSEEN.values():
            continue
        parts = load(Task("clinc150", "model", steps, batch_size, domain))
        for seed in range(seeds):
            settings = TrainSettings(
                max_steps=steps, batch_size=batch_size, learning_rate=rate, head_learning_rate=1e-2, seed=seed
            )
            made.append(folder / f"{domain}-{seed}")
            classifier = TextClassifier.create(
                base(), parts.labels, config(task_type="SEQ_CLS"), pooling="model", seed=seed
            )
            classifier.train(parts.train, settings)
            classifier.save(made[-1])
    return made
