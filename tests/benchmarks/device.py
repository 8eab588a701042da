"""Ratios of X-PEFT beside PEFT's LoRA on an accelerator, in bfloat16, at the shapes of real language models.

Random weights: only shapes matter here. Without an accelerator the script runs at a tiny shape, which shows that it
works, and says what was not measured.

Rows (all ratios are medians of rounds, each candidate in turn within a round, with the 95 % interval of the median):
  step        forward, backward and AdamW step, 2 x 16 tokens: X-PEFT over LoRA r=8 on q and v
  mixing      mixing one row's adapters at every site, over that LoRA training step
  mixed       forward of a batch in which each example has a profile of its own, over as many LoRAs in one batch
  switch      choosing another profile and the forward pass after it, less a plain forward pass, over LoRA's
  compiled    forward under torch.compile, over the uncompiled one
  pool        seconds to make the random pool, over seconds to make the base
  memory      bytes of the pool, over bytes of the base

Prints a table and, last, one JSON line.
"""

import argparse
import os
import tempfile
import time
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from rich.table import Table
from timing import Summary, in_turn, out, paired_ratio, print_json, progress, twin
from transformers import LlamaConfig, LlamaForCausalLM

import peft_xmask
from peft_xmask import AdapterPool, ProfileBank, XPEFTConfig
from peft_xmask.pool import BOTTLENECK_SIZE, NUM_ADAPTERS
from peft_xmask.tuners.xpeft.layer import XPEFTLayer
from peft_xmask.tuners.xpeft.table import find_table

SHAPES = {
    "tiny": (2, 64, 4, 172, 256),
    "1b": (16, 2048, 32, 5632, 32_000),
    "7b": (32, 4096, 32, 11_008, 32_000),
}
FIELDS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")


def make_base(shape, device, dtype):
    """A random language model, made where it stays."""
    config = LlamaConfig(**dict(zip(FIELDS, SHAPES[shape], strict=True)))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def batch_of(base, examples, tokens):
    ids = torch.randint(1, base.config.vocab_size, (examples, tokens), device=base.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def training_step(model, batch):
    model.train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)

    def step():
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def forward(model, batch, **kwargs):
    @torch.no_grad()
    def run():
        model(**batch, **kwargs)

    return run


def bank_model(base, config, names):
    """The base, serving a bank in which every profile has random masks of its own."""
    with tempfile.TemporaryDirectory() as folder:
        model = get_peft_model(twin(base), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "xpeft_logits" in name:
                    parameter.normal_()
        model.save_pretrained(folder)
        model = PeftModel.from_pretrained(twin(base), folder)
        bank = ProfileBank.from_model(model, names)
    served = bank.attach(twin(base))
    return served.eval()


def lora_model(base, names):
    config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(twin(base), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model.eval()


def ratios(title, candidates, pairs, options, bar):
    """``label -> Summary`` for pairs of names of candidates that take turns."""
    task = bar.add_task(title, total=options.rounds)
    times = in_turn(candidates, options.rounds, options.limit, lambda: bar.advance(task), options.device)
    return {label: paired_ratio(times, name, reference) for label, (name, reference) in pairs.items()}, times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if found else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="1b" if found else "tiny")
    parser.add_argument("--num-adapters", type=int, default=NUM_ADAPTERS)
    parser.add_argument("--bottleneck-size", type=int, default=BOTTLENECK_SIZE)
    parser.add_argument("--distinct", type=int, default=64, help="profiles of the mixed batch (64)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds a group of candidates (60)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    device, dtype = options.device, torch.bfloat16

    start = time.perf_counter()
    base = make_base(options.shape, device, dtype)
    base_seconds = time.perf_counter() - start
    sizes = dict(num_adapters=options.num_adapters, bottleneck_size=options.bottleneck_size)
    start = time.perf_counter()
    pool = AdapterPool.random(**sizes, seed=0, dtype=dtype)
    config = XPEFTConfig(task_type="CAUSAL_LM", pool_dtype="bfloat16", **sizes)
    xpeft = get_peft_model(twin(base), config)
    pool_seconds = time.perf_counter() - start
    lora = get_peft_model(twin(base), LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]))

    names = [f"p{number}" for number in range(options.distinct)]
    small, wide = batch_of(base, 2, 16), batch_of(base, options.distinct, 16)
    results = {}
    with progress() as bar:
        group = {"xpeft": training_step(xpeft, small), "lora": training_step(lora, small)}
        group["mixing"] = mixing(xpeft)
        pairs = {"step": ("xpeft", "lora"), "mixing": ("mixing", "lora")}
        results.update(ratios("training", group, pairs, options, bar)[0])
        serving = XPEFTConfig(task_type="CAUSAL_LM", pool_dtype="bfloat16", num_profiles=options.distinct, **sizes)
        bank, loras = bank_model(base, serving, names), lora_model(base, names)
        group = {
            "bank": forward(bank, wide, adapter_names=names),
            "loras": forward(loras, wide, adapter_names=names),
        }
        results.update(ratios("mixed batch", group, {"mixed": ("bank", "loras")}, options, bar)[0])
        group = switching(bank, loras, names, batch_of(base, 1, 16))
        _, times = ratios("switch", group, {}, options, bar)
        extra = [
            (a - b) / (c - d)
            for a, b, c, d in zip(times["bank"], times["bank still"], times["loras"], times["loras still"], strict=True)
            if c > d
        ]
        if extra:
            results["switch"] = Summary.of(extra)
        bank.set_profile(names[0])
        compiled = torch.compile(bank)
        group = {"compiled": forward(compiled, small), "plain": forward(bank, small)}
        results.update(ratios("compiled", group, {"compiled": ("compiled", "plain")}, options, bar)[0])

    pool_bytes = sum(module.nbytes for module in xpeft.modules() if type(module).__name__ == "PoolSlice")
    base_bytes = sum(parameter.nbytes for parameter in base.parameters())
    shown = Table(title=f"{options.shape}, {device}, bfloat16, pool {options.num_adapters} x {options.bottleneck_size}")
    for column in ("ratio", "median (95 % interval)"):
        shown.add_column(column)
    for name, ratio in results.items():
        shown.add_row(name, f"{ratio.median:.3f} ({ratio.interval[0]:.3f}-{ratio.interval[1]:.3f})")
    shown.add_row("pool (seconds over the base's)", f"{pool_seconds / base_seconds:.3f}")
    shown.add_row("memory (bytes over the base's)", f"{pool_bytes / base_bytes:.4f}")
    out().print(shown)
    measured = device != "cpu"
    unmeasured = [] if measured else [*results, "pool", "memory"]
    if not measured:
        print(
            f"No accelerator: the script ran at the shape '{options.shape}' on the CPU, to show that it works. Not "
            f"measured in bfloat16 at the shapes 1b and 7b: {', '.join(unmeasured)}."
        )
    print_json(
        {
            "benchmark": "device",
            "device": torch.cuda.get_device_name() if measured else "cpu",
            "measured_on_an_accelerator": measured,
            "not_measured": unmeasured,
            "shape": options.shape,
            "pool": [options.num_adapters, options.bottleneck_size],
            "distinct": options.distinct,
            "peft": peft.__version__,
            "torch": torch.__version__,
            "peft_xmask": peft_xmask.__version__,
            "pool_over_base_seconds": round(pool_seconds / base_seconds, 4),
            "pool_over_base_bytes": round(pool_bytes / base_bytes, 5),
            "pool_fingerprint": pool.fingerprint,
            **{name: ratio.as_dict() for name, ratio in results.items()},
        }
    )


def mixing(model, *, backward=False):
    """Makes all sites' mixed adapters of the one row, as a training pass does at each step.

    ``backward``: and carries a gradient of each back to the masks.
    """
    table = find_table(model)
    layers = [layer for layer in model.modules() if isinstance(layer, XPEFTLayer)]

    def run():
        table.begin([])
        pairs = [layer.pair("default") for layer in layers]
        table.end(None)
        if backward:
            mixed = [part for pair in pairs for part in (pair.down, pair.up)]
            torch.autograd.backward(mixed, [part.detach() for part in mixed])
            model.zero_grad()

    return run


def switching(bank, loras, names, batch):
    """A pass after a switch, and one without, for both."""
    turn = {"bank": 0, "loras": 0}

    def after_switch(kind, choose, run):
        def once():
            turn[kind] = (turn[kind] + 1) % len(names)
            choose(names[turn[kind]])
            run()

        return once

    return {
        "bank": after_switch("bank", bank.set_profile, forward(bank, batch)),
        "bank still": forward(bank, batch),
        "loras": after_switch("loras", loras.set_adapter, forward(loras, batch)),
        "loras still": forward(loras, batch),
    }


if __name__ == "__main__":
    main()
