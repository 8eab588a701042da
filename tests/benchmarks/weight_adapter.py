"""What a weight adapter costs: seconds of a training step, seconds of inference, and bytes.

Training: forward, backward and AdamW step of a sequence classifier (dropout as configured, head trained by every
method) on one batch of random tokens. Every method adapts the same modules, both linear layers of each feed-forward
network:

  BitFit            their biases as ordinary parameters, everything else frozen: what `target="bias"` reaches
  PEANuT r=16       PEFT's adapter over the weights, which it keeps
  LoRA r=16         PEFT's LoRA
  weight adapter    `target="bias"` and `target="weight"`, r=16

Inference: forward in eval mode under `no_grad`, adapters loaded from their files, beside the base alone.

Candidates take turns in every round, so that other work on the machine hits them alike. A target counts as met or
missed only if the whole interval lies on one side of it.

Columns:
  median      seconds, median over rounds (quartiles in brackets)
  best        seconds, the fastest round
  ratio       median over rounds of the time divided by the reference's time in the same round, with the 95 % interval
              of that median

Bytes: the file of a model with RoBERTa-large's widths, and the share of its parameters. Prints tables and, last, one
JSON line.
"""

import argparse
import copy
import os
import tempfile
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers
from peft import LoraConfig, PeanutConfig, PeftModel, get_peft_model
from rich.table import Table
from timing import Summary, in_turn, load_average, out, paired_ratio, print_json, progress
from training_step import make_base, make_batch
from transformers import RobertaConfig, RobertaModel

import peft_xmask
from peft_xmask import WeightAdapterConfig, profile_size
from peft_xmask.tuners.base.targets import FFN_LINEAR

BITFIT, PEANUT, LORA, BASE = "BitFit, same biases", "PEANuT r=16", "LoRA r=16", "base"
BIAS, WEIGHT, MERGED = 'weight adapter, "bias"', 'weight adapter, "weight"', 'weight adapter, "bias", merged'
TARGETS = FFN_LINEAR["bert"]
LIMITS = {
    (BIAS, BITFIT): 1.05,
    (WEIGHT, PEANUT): 0.90,
    (WEIGHT, LORA): 1.10,
}
ROBERTA_LARGE = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
    "max_position_embeddings": 514, "type_vocab_size": 1,
}  # fmt: skip


def training_candidates(base, batch, device):
    labels = torch.arange(batch["input_ids"].shape[0], device=device) % 2
    head = ["classifier"]
    configs = {
        BIAS: WeightAdapterConfig(task_type="SEQ_CLS"),
        WEIGHT: WeightAdapterConfig(task_type="SEQ_CLS", target="weight"),
        PEANUT: PeanutConfig(target_modules=TARGETS, modules_to_save=head, r=16),
        LORA: LoraConfig(target_modules=TARGETS, modules_to_save=head, r=16, lora_alpha=16),
    }
    candidates = {BITFIT: step_of(bitfit(base), batch, labels)}
    for name, config in configs.items():
        torch.manual_seed(0)
        candidates[name] = step_of(get_peft_model(copy.deepcopy(base), config), batch, labels)
    return candidates


def bitfit(base):
    """A copy of the model of which these biases and the head are trained."""
    model = copy.deepcopy(base)
    wrapped = get_peft_model(copy.deepcopy(base), WeightAdapterConfig(task_type="SEQ_CLS"))
    for name in wrapped.base_model.targeted_module_names:
        model.get_submodule(name).bias.requires_grad_(True)
    model.classifier.requires_grad_(True)
    return model


def step_of(model, batch, labels):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step():
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def inference_candidates(base, batch):
    models = {BASE: copy.deepcopy(base).eval()}
    for name, target in ((BIAS, "bias"), (WEIGHT, "weight")):
        config = WeightAdapterConfig(task_type="SEQ_CLS", target=target, init_weights=False)
        with tempfile.TemporaryDirectory() as folder:
            get_peft_model(copy.deepcopy(base), config).save_pretrained(folder)
            models[name] = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
            if name == BIAS:
                models[MERGED] = PeftModel.from_pretrained(copy.deepcopy(base), folder).merge_and_unload().eval()

    def forward(model):
        with torch.no_grad():
            model(**batch)

    return {name: lambda model=model: forward(model) for name, model in models.items()}


def stored_bytes():
    """Bytes of the file of a model with RoBERTa-large's widths; its vocabulary, which is not adapted, is small."""
    base = RobertaModel(RobertaConfig(**ROBERTA_LARGE, vocab_size=30)).half()
    facts = {}
    for dtype in ("float32", "float16"):
        model = get_peft_model(base, WeightAdapterConfig(storage_dtype=dtype))
        size = profile_size(model)
        facts[dtype] = {"payload": size.payload_bytes, "file": size.file_bytes}
        base = model.unload()
    numbers = facts["float32"]["payload"] // 4
    with torch.device("meta"):
        whole = RobertaModel(RobertaConfig(**ROBERTA_LARGE, vocab_size=50265)).num_parameters()
    return {**facts, "numbers": numbers, "parameters": whole, "share": numbers / whole}


def measure(title, candidates, references, rounds, limit, device):
    """Table of one group of candidates, and their ratios to each reference."""
    with progress() as bar:
        task = bar.add_task(title, total=rounds)
        times = in_turn(candidates, rounds, limit, lambda: bar.advance(task), device)
    table = Table(title=f"{title}; {len(times[references[0]])} rounds")
    for column in ("candidate", "median", "best", *(f"ratio to {name}" for name in references)):
        table.add_column(column, justify="left" if column == "candidate" else "right")
    facts = {}
    for name, values in times.items():
        time, ratios = Summary.of(values), {other: paired_ratio(times, name, other) for other in references}
        low, high = time.quartiles
        cells = [f"{r.median:.3f} ({r.interval[0]:.3f}-{r.interval[1]:.3f})" for r in ratios.values()]
        table.add_row(name, f"{time.median:.4f} ({low:.4f}-{high:.4f})", f"{min(values):.4f}", *cells)
        facts[name] = {"seconds": time, "best_seconds": round(min(values), 5), "ratios": ratios}
    return table, facts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("minilm", "base"), default="minilm", help="6 x 384 (default) or 12 x 768")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (2)")
    parser.add_argument("--examples", type=int, default=32, help="texts in a batch (32)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens in a text (64)")
    parser.add_argument("--rounds", type=int, default=40, help="most rounds of training; inference has twice as many")
    parser.add_argument("--limit", type=float, default=150.0, help="no new round after this many s in all (150)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, about its next version
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    load, device, console = load_average(), options.device, out()
    torch.manual_seed(0)
    base, weights = make_base(options.shape)
    base = base.to(device).requires_grad_(False)
    batch = make_batch(base, options.examples, options.tokens, device)
    size = f"{options.examples} x {options.tokens} tokens"
    training = training_candidates(base, batch, device)
    references = [BITFIT, PEANUT, LORA]
    table, trained = measure(
        f"Training step, {size}", training, references, options.rounds, 0.7 * options.limit, device
    )
    console.print(table)
    serving = inference_candidates(base, batch)
    table, served = measure(f"Inference, {size}", serving, [BASE], 2 * options.rounds, 0.3 * options.limit, device)
    console.print(table)

    verdicts = {}
    for (name, reference), limit in LIMITS.items():
        ratio = trained[name]["ratios"][reference]
        verdicts[f"{name} / {reference}"] = {
            "ratio": round(ratio.median, 4),
            "limit": limit,
            "verdict": ratio.verdict(limit),
        }
        console.print(f"{name} / {reference}: {ratio.median:.3f}, at most {limit:.2f}: {ratio.verdict(limit)}")
    stored = stored_bytes()
    console.print(
        f"RoBERTa-large's widths, biases: {stored['float32']['payload']:,} bytes in float32 (file "
        f"{stored['float32']['file']:,}), {stored['float16']['payload']:,} in float16 (file "
        f"{stored['float16']['file']:,}); {stored['numbers']:,} of {stored['parameters']:,} parameters, "
        f"{stored['share']:.4%}"
    )
    versions = {"peft": peft.__version__, "torch": torch.__version__, "peft_xmask": peft_xmask.__version__}
    console.print(f"{options.shape} ({weights}), {device}, threads: {options.threads}, load: {load}; {versions}")
    print_json(
        {
            "benchmark": "weight_adapter",
            "shape": options.shape,
            "weights": weights,
            "device": device,
            "threads": options.threads,
            "load_average": load,
            "batch": [options.examples, options.tokens],
            **versions,
            "targets": verdicts,
            "bytes": stored,
            "training": {name: as_json(fact) for name, fact in trained.items()},
            "inference": {name: as_json(fact) for name, fact in served.items()},
        }
    )


def as_json(fact):
    ratios = {name: ratio.as_dict(5) for name, ratio in fact["ratios"].items()}
    return {"seconds": fact["seconds"].as_dict(5), "best_seconds": fact["best_seconds"], "ratios": ratios}


if __name__ == "__main__":
    main()
