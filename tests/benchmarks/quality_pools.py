"""Pools of the study that are not made from a seed alone: other random draws, and adapters trained on other domains.

A pool is made when it is first wanted and kept in a folder of the system's temporary directory.
"""

import functools
import os
import re
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from quality_tasks import SEEN, TASKS, Task, base, load
from safetensors.torch import load_file
from transformers import AutoModel

from peft_xmask import AdapterPool, BottleneckConfig
from peft_xmask.cli.classify import TextClassifier
from peft_xmask.cli.train_settings import TrainSettings

KEPT = Path(tempfile.gettempdir()) / "peft_xmask-quality-pools"
SIZE, WIDTH = 100, 48
STD = 0.1
ADAPTER_SEEDS, LORA_SEEDS = 4, 2  # adapters of each seen domain
ADAPTERS = len(SEEN) * ADAPTER_SEEDS
SITES = 6  # blocks of MiniLM, an adapter in each


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


@functools.cache
def cut_adapters(width):
    """Those of :func:`trained_adapters`, each cut into pieces of ``width`` hidden units: more masks over as many bytes.

    A piece has an equal share of its adapter's output bias, so that the pieces of an adapter add up to it.
    """
    kept, pieces = sites_of(trained_adapters(WIDTH)), WIDTH // width

    def piece(number):
        adapter, part = divmod(number, pieces)
        units = slice(part * width, (part + 1) * width)
        return {
            name: {
                "down": site["down"][adapter, units],
                "down_bias": site["down_bias"][adapter, units],
                "up": site["up"][adapter, :, units],
                "up_bias": site["up_bias"][adapter] / pieces,
            }
            for name, site in kept.items()
        }

    return pool_in(f"cut-{width}", lambda folder: written(folder, width, map(piece, range(ADAPTERS * pieces))))


@functools.cache
def principal_adapters(width):
    """Principal directions of :func:`trained_adapters`, in order of their size.

    At each site those of all adapters' down-projections as vectors, and of their up-projections, each as long as its
    singular value: the first is nearly the adapters' mean, and together they span what the adapters span.
    """
    found = {
        name: directions(site["down"], site["down_bias"], "down") | directions(site["up"], site["up_bias"], "up")
        for name, site in sites_of(trained_adapters(width)).items()
    }

    def direction(number):
        return {name: {part: tensor[number] for part, tensor in site.items()} for name, site in found.items()}

    return pool_in(f"principal-{width}", lambda folder: written(folder, width, map(direction, range(ADAPTERS))))


def directions(weight, bias, name):
    """Singular directions of N projections with their biases; each points to where more of them do."""
    left, sizes, rows = torch.linalg.svd(torch.cat([weight.flatten(1), bias], 1), full_matrices=False)
    rows = rows * (sizes * left.sum(0).sign())[:, None]
    return {name: rows[:, : weight[0].numel()].view_as(weight), f"{name}_bias": rows[:, weight[0].numel() :]}


def sites_of(pool, common=False):
    """Tensors of a kept pool, of all its adapters: by the module's name, from "layer" on, and the part's.

    Those of its common adapter, if ``common``.
    """
    sites = {}
    tensors = load_file(Path(pool.name_or_path) / "pool.safetensors")
    for name, tensor in tensors.items():
        if name.startswith("common/") != common:
            continue
        site, part = name.rsplit(".", 1)
        sites.setdefault(site[site.index("layer.") :], {})[part] = tensor
    return sites


def written(folder, width, adapters):
    """Folders of bottleneck adapters with these tensors."""
    model = get_peft_model(AutoModel.from_pretrained(base()), BottleneckConfig(bottleneck_size=width))
    places = {}
    for name, parameter in trained(model):
        site, part = re.fullmatch(r".*(layer\..*)\.bottleneck_adapter_(.*)", name).groups()
        places[site, part.replace(".default.weight", "").replace(".default.bias", "_bias")] = parameter
    folders = []
    for number, sites in enumerate(adapters):
        with torch.no_grad():
            for (site, part), parameter in places.items():
                parameter.copy_(sites[site][part])
        folders.append(folder / f"{number:03}")
        model.save_pretrained(folders[-1])
    return folders


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
    steps, batch_size = TASKS["car"].steps, TASKS["car"].batch_size
    made = []
    for domain in SEEN:
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
