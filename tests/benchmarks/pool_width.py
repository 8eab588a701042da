"""What the width of a random pool costs. Prints a table and, last, one JSON line.

MiniLM's shape with random weights and 100 adapters a site, at several widths b:
  pool       bytes of the pool, and of that of a model with 7 billion parameters in bfloat16, over that base's own
  made       seconds to make the pool
  step       training step of 2 x 16 tokens over that of LoRA r=8 on query and value
  mixing     mixing one profile's adapters at every site as a training pass does it, over that LoRA step
  floor      the products of its matrices with a vector alone, which read the pool once
  both ways  mixing, and the backward pass from the mixed adapters to the masks
  switch     what choosing another profile adds to a forward pass of 1 x 16 tokens

Ratios are medians over rounds in which all candidates take turns, with the 95 % interval of the median.
"""

import argparse
import time

import torch
from device import batch_of, mixing
from peft import LoraConfig, get_peft_model
from profiles_at_scale import SHAPES, random_masks
from rich.table import Table
from timing import Summary, in_turn, load_average, out, paired_ratio, print_json, progress, twin
from transformers import BertConfig, BertForSequenceClassification

from peft_xmask import ProfileBank, XPEFTConfig
from peft_xmask.core.packing import pack_halves
from peft_xmask.pool import PoolSlice

ADAPTERS, USERS = 100, 20
RATIOS = ("step", "mixing", "floor", "both ways")
SEVEN_B = {"blocks": 32, "width": 4096, "bytes": 6.74e9 * 2}
"""Llama 2 7B, whose feed-forward outputs have 11,008 inputs and 4,096 outputs; sequential adapters read the outputs."""


def bank_of(model):
    spec = model.masks("default").spec
    bits = random_masks(USERS, spec.num_sites, spec.num_adapters, spec.top_k)
    gains = pack_halves(torch.full((USERS, spec.num_sites, 1), spec.scale))
    shared = ProfileBank.from_model(model, ["one"]).shared
    return ProfileBank(model.peft_config["default"], bits, gains, [f"user-{i}" for i in range(USERS)], shared)


def trained(model, batch):
    model.train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    labels = torch.zeros(len(batch["input_ids"]), dtype=torch.long)

    def step():
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def forward(model, batch, turn=None):
    @torch.no_grad()
    def run():
        if turn is not None:
            turn[0] += 1
            model.set_profile(f"user-{turn[0] % USERS}")
        model(**batch)

    return run


def products(model):
    pools = [module for module in model.modules() if isinstance(module, PoolSlice)]
    matrices = [part.flatten(1).t() for pool in pools for part in (pool.down, pool.up)]
    vector = torch.randn(ADAPTERS)
    return lambda: [torch.mv(matrix, vector) for matrix in matrices]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=[4, 12, 48])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds a group of candidates")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(vocab_size=1000, **SHAPES["minilm"])).requires_grad_(False)
    short, one = batch_of(base, 2, 16), batch_of(base, 1, 16)
    lora = get_peft_model(twin(base), LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"]))
    training, serving, made = {"lora": trained(lora, short)}, {}, {}
    for width in options.widths:
        config = XPEFTConfig(task_type="SEQ_CLS", num_adapters=ADAPTERS, bottleneck_size=width)
        start = time.perf_counter()
        model = get_peft_model(twin(base), config)
        made[width] = time.perf_counter() - start
        training[f"step {width}"] = trained(model, short)
        training[f"mixing {width}"] = mixing(model.train())
        training[f"floor {width}"] = products(model)
        training[f"both ways {width}"] = mixing(model, backward=True)
        bank = bank_of(model)
        served, still = bank.attach(twin(base)).eval(), bank.attach(twin(base)).eval()
        still.set_profile("user-1")
        serving[f"switch {width}"], serving[f"still {width}"] = forward(served, one, [0]), forward(still, one)
    with progress() as bar:
        task = bar.add_task("width", total=2 * options.rounds)
        times = in_turn(training, options.rounds, options.limit, lambda: bar.advance(task))
        switches = in_turn(serving, 2 * options.rounds, options.limit, lambda: bar.advance(task))
    facts = {"benchmark": "pool_width", "threads": torch.get_num_threads(), "load_average": load_average()}
    shown = Table(title=f"100 adapters a site; LoRA step {1e3 * Summary.of(times['lora']).median:.1f} ms")
    for column in ("b", "pool", "of a 7B base", "made", *RATIOS, "switch"):
        shown.add_column(column)
    for width in options.widths:
        layers, d = SHAPES["minilm"]["num_hidden_layers"], SHAPES["minilm"]["hidden_size"]
        pool = 4 * ADAPTERS * width * 2 * d * layers
        large = 2 * ADAPTERS * width * 2 * SEVEN_B["width"] * SEVEN_B["blocks"] / SEVEN_B["bytes"]
        ratios = {
            name: paired_ratio(times, f"{name} {width}", "lora") for name in ("step", "mixing", "floor", "both ways")
        }
        extra = zip(switches[f"switch {width}"], switches[f"still {width}"], strict=True)
        ratios["switch_ms"] = Summary.of([1e3 * (a - b) for a, b in extra])
        facts[f"b={width}"] = {
            "pool_bytes": pool, "of_7b": round(large, 4), "seconds": round(made[width], 3),
            **{name: ratio.as_dict() for name, ratio in ratios.items()},
        }  # fmt: skip
        cells = [f"{r.median:.3f} ({r.interval[0]:.3f}-{r.interval[1]:.3f})" for r in ratios.values()]
        shown.add_row(str(width), f"{pool / 1e6:.1f} MB", f"{large:.1%}", f"{made[width]:.2f} s", *cells)
    out().print(shown)
    print_json(facts)


if __name__ == "__main__":
    main()
