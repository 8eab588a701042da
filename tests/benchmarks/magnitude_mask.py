"""The magnitude mask beside PEFT's SHiRA, Super-Tuning and LoRA, and full fine-tuning of the same modules.

All linear layers of the blocks of a BERT shape are adapted, 0.5 % of their weights trained. SHiRA counts its numbers in
ranks: r=1 is 1/256 of the weights at width 384, and is compared with a mask of that density. The head is trained by
every method. The floor is the head alone on top of the base's own forward pass, with gradients sent back through every
linear layer as far as adapters in all of them need them: what no method over these layers can do without.

Parts and columns:
  training    seconds of forward, backward and AdamW step on random tokens: median (quartiles), best round, and the
              ratio to LoRA r=8 in the same round (95 % interval of its median)
  kept        bytes that autograd keeps from the forward to the backward pass, parameters not counted; beyond what full
              fine-tuning of the same modules keeps, as a share of the bytes of the adapted weights
  inference   seconds of a forward pass in eval mode, as above; the ratio is to the bare base
  switching   from one profile that serves to another that is ready to serve: ours by `set_adapter`, Super-Tuning by
              `unmerge_adapter`, `set_adapter` and `merge_adapter`, after which both run at the base's speed
  disk        bytes of `adapter_model.safetensors`, without a head, by trainable parameter

Candidates take turns in every round, so that other work on the machine hits them alike. A target counts as met or
missed only if the whole interval lies on one side of it. Prints tables and, last, one JSON line.
"""

import argparse
import copy
import os
import tempfile
import warnings
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers
from peft import LoraConfig, ShiraConfig, SupertuningConfig, get_peft_model
from rich.table import Table
from timing import Summary, in_turn, load_average, out, paired_ratio, print_json, progress
from transformers import BertConfig, BertForSequenceClassification

import peft_xmask
from peft_xmask import MagnitudeMaskConfig
from peft_xmask.tuners.in_place.layer import InPlaceLayer

DENSITY, SHIRA_DENSITY = 0.005, 1 / 256
TARGETS = (
    r".*layer\.\d+\.(attention\.self\.(query|key|value)|attention\.output\.dense|intermediate\.dense|output\.dense)"
)
OURS, EQUAL, HALF, SHIRA, SUPER, LORA, FULL, BASE, FLOOR = (
    "magnitude mask", "magnitude mask 1/256", "magnitude mask, bf16 files", "SHiRA r=1",
    "Super-Tuning, smallest", "LoRA r=8", "full", "base", "floor",
)  # fmt: skip


def config(name, **fields):
    """PEFT config of a candidate; None for those without an adapter."""
    common = {"target_modules": TARGETS, **fields}
    return {
        OURS: lambda: MagnitudeMaskConfig(density=DENSITY, **common),
        EQUAL: lambda: MagnitudeMaskConfig(density=SHIRA_DENSITY, **common),
        HALF: lambda: MagnitudeMaskConfig(density=DENSITY, storage_dtype="bfloat16", **common),
        SHIRA: lambda: ShiraConfig(r=1, **common),
        SUPER: lambda: SupertuningConfig(sparsity=1 - DENSITY, select_top=False, **common),
        LORA: lambda: LoraConfig(r=8, lora_alpha=16, **common),
    }[name]()


def make_base(options):
    sizes = {"hidden_size": options.width, "intermediate_size": 4 * options.width, "num_hidden_layers": options.layers}
    return BertForSequenceClassification(
        BertConfig(vocab_size=2000, num_attention_heads=options.width // 32, num_labels=4, **sizes)
    )


def make_model(base, name):
    """A candidate on weights of its own: some write into them."""
    model = copy.deepcopy(base).requires_grad_(False)
    torch.manual_seed(0)
    if name == BASE:
        return model
    if name == FULL:
        for _, each in linears(model):
            each.weight.requires_grad_(True)
        model.classifier.requires_grad_(True)
        return model
    if name == FLOOR:
        start = torch.zeros((), requires_grad=True)
        for _, each in linears(model):
            each.forward = partial(Bare.apply, each, start)
        model.classifier.requires_grad_(True)
        return model
    return get_peft_model(model, config(name, task_type="SEQ_CLS"))


class Bare(torch.autograd.Function):
    """A frozen linear layer whose output has a gradient, as if something in it were trained."""

    @staticmethod
    def forward(ctx, module, start, x):
        ctx.module = module
        return torch.nn.functional.linear(x, module.weight, module.bias)

    @staticmethod
    def backward(ctx, grad):
        return None, None, grad @ ctx.module.weight if ctx.needs_input_grad[2] else None


def linears(model):
    return [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layer." in f".{n}"]


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def training_step(model, batch, labels):
    model.train()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3)

    def step():
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def kept_bytes(model, batch):
    """Bytes that autograd keeps after a forward pass, each storage once, parameters not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        parts = (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)
        for storage in (part.untyped_storage() for part in parts):
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    model.train()
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).logits.sum()
    total = sum(size for size, _ in kept.values())
    loss.backward()
    model.zero_grad()
    return total


def inference(model, batch):
    model.eval()

    def run():
        with torch.no_grad():
            model(**batch)

    return run


def switching(base, batch):
    """Callables that switch between two profiles, back and forth."""
    made = {}
    for name in (OURS, SUPER):
        model = get_peft_model(copy.deepcopy(base).requires_grad_(False), config(name)).eval()
        model.add_adapter("other", config(name))
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "values" in parameter_name:
                    parameter.normal_(std=0.01)
            model(**batch)
        made[name] = model
    ours, theirs = made[OURS], made[SUPER]
    theirs.merge_adapter()
    layers = [module for module in ours.modules() if isinstance(module, InPlaceLayer)]
    turn = {OURS: 0, SUPER: 0}

    def switch_ours():
        turn[OURS] ^= 1
        ours.set_adapter(("default", "other")[turn[OURS]])
        for layer in layers:  # what the next forward pass would do first
            if not layer._state.is_current():
                layer.sync()

    def switch_theirs():
        turn[SUPER] ^= 1
        theirs.unmerge_adapter()
        theirs.set_adapter(("default", "other")[turn[SUPER]])
        theirs.merge_adapter()

    return {OURS: switch_ours, SUPER: switch_theirs}


def disk(base):
    found = {}
    for name in (OURS, EQUAL, HALF, SHIRA, SUPER, LORA):
        model = get_peft_model(copy.deepcopy(base), config(name))
        numbers = sum(parameter.numel() for parameter in trained(model))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            size = (Path(folder) / "adapter_model.safetensors").stat().st_size
        found[name] = {"trained": numbers, "bytes": size, "bytes_per_number": round(size / numbers, 3)}
    return found


def measure(title, candidates, reference, rounds, limit):
    with progress() as bar:
        task = bar.add_task(title, total=rounds)
        times = in_turn(candidates, rounds, limit, lambda: bar.advance(task))
    table = Table(title=f"{title}; {len(times[reference])} rounds")
    table.add_column("candidate")
    for column in ("median", "best", f"ratio to {reference}"):
        table.add_column(column, justify="right")
    for name, values in times.items():
        time, ratio = Summary.of(values), paired_ratio(times, name, reference)
        low, high = time.quartiles
        cells = f"{time.median:.4f} ({low:.4f}-{high:.4f})", f"{min(values):.4f}"
        table.add_row(name, *cells, f"{ratio.median:.3f} ({ratio.interval[0]:.3f}-{ratio.interval[1]:.3f})")
    out().print(table)
    return times


def facts_of(times):
    return {
        name: {"seconds": Summary.of(values).as_dict(5), "best_seconds": round(min(values), 5)}
        for name, values in times.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="torch threads (2)")
    parser.add_argument("--layers", type=int, default=6, help="blocks (6)")
    parser.add_argument("--width", type=int, default=384, help="width, a multiple of 32 (384)")
    parser.add_argument("--examples", type=int, default=32, help="texts in a batch (32)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens in a text (64)")
    parser.add_argument("--rounds", type=int, default=30, help="most rounds of training; others have more (30)")
    parser.add_argument("--limit", type=float, default=180.0, help="no new round after this many s in all (180)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # of PEFT, about merging twice; of transformers, about its next version
    transformers.logging.set_verbosity_error()

    load = load_average()
    torch.manual_seed(0)
    base = make_base(options)
    ids = torch.randint(1, 2000, (options.examples, options.tokens))
    batch, labels = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.arange(options.examples) % 4
    weights = sum(module.weight.nbytes for _, module in linears(base))

    models = {name: make_model(base, name) for name in (LORA, OURS, EQUAL, SHIRA, SUPER, FULL)}
    kept = {name: kept_bytes(model, batch) for name, model in models.items()}
    models[FLOOR] = make_model(base, FLOOR)
    beyond = {name: (kept[name] - kept[FULL]) / weights for name in kept}
    steps = {name: training_step(model, batch, labels) for name, model in models.items()}
    training = measure("Training step", steps, LORA, options.rounds, 0.6 * options.limit)
    runs = {name: inference(make_model(base, name), batch) for name in (BASE, OURS)}
    forward = measure("Inference", runs, BASE, 3 * options.rounds, 0.25 * options.limit)
    single = {name: value[:1, :16] for name, value in batch.items()}
    short = {name: inference(make_model(base, name), single) for name in (BASE, OURS)}
    shorter = measure("Inference, 1 x 16 tokens", short, BASE, 20 * options.rounds, 0.1 * options.limit)
    switches = measure("Switching", switching(base, single), OURS, 10 * options.rounds, 0.1 * options.limit)
    files = disk(base)

    console = out()
    table = Table(title=f"Kept for backward and on disk; adapted weights: {weights:,} bytes")
    for column in ("candidate", "kept beyond full", "trained", "file", "bytes a number"):
        table.add_column(column, justify="left" if column == "candidate" else "right")
    for name in (OURS, EQUAL, HALF, SHIRA, SUPER, LORA):
        share = f"{beyond[name]:.1%}" if name in beyond else ""
        file = files[name]
        table.add_row(name, share, f"{file['trained']:,}", f"{file['bytes']:,}", f"{file['bytes_per_number']:.3f}")
    console.print(table)
    ratios = {
        "training, 1/256 / SHiRA": (paired_ratio(training, EQUAL, SHIRA), 0.85),
        "training / Super-Tuning": (paired_ratio(training, OURS, SUPER), 0.85),
        "training / LoRA r=8": (paired_ratio(training, OURS, LORA), 0.90),
        "training / floor": (paired_ratio(training, OURS, FLOOR), None),
        "floor / SHiRA": (paired_ratio(training, FLOOR, SHIRA), None),
        "floor / Super-Tuning": (paired_ratio(training, FLOOR, SUPER), None),
        "floor / LoRA r=8": (paired_ratio(training, FLOOR, LORA), None),
        "inference / base": (paired_ratio(forward, OURS, BASE), 1.01),
        "inference, 1 x 16 / base": (paired_ratio(shorter, OURS, BASE), 1.05),
        "switching / Super-Tuning": (paired_ratio(switches, OURS, SUPER), 0.20),
    }
    for name, (ratio, limit) in ratios.items():
        low, high = ratio.interval
        aim = "" if limit is None else f", target {limit:.2f}: {ratio.verdict(limit)}"
        console.print(f"{name}: {ratio.median:.3f} ({low:.3f}-{high:.3f}){aim}")
    versions = {"peft": peft.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    console.print(f"threads: {options.threads}, load before: {load}; {versions}, peft_xmask {peft_xmask.__version__}")
    print_json(
        {
            "benchmark": "magnitude_mask",
            "shape": [options.layers, options.width],
            "batch": [options.examples, options.tokens],
            "threads": options.threads,
            "load_average": load,
            **versions,
            "peft_xmask": peft_xmask.__version__,
            "ratios": {
                name: {**ratio.as_dict(), "limit": limit, "verdict": None if limit is None else ratio.verdict(limit)}
                for name, (ratio, limit) in ratios.items()
            },
            "kept_beyond_full": {name: round(value, 4) for name, value in beyond.items()},
            "disk": files,
            "training": facts_of(training),
            "inference": facts_of(forward),
            "inference_single": facts_of(shorter),
            "switching": facts_of(switches),
        }
    )


if __name__ == "__main__":
    main()
