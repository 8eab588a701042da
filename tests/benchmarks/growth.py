"""How costs grow with the number of profiles: adding, finding, choosing and mixing. Prints a table and, last, JSON.

The same tiny base (two blocks of width 64) holds banks of 10 to a million profiles, and PEFT LoRAs of rank 1 on query
and value. Work is measured in processor time, because wall time says little on a busy machine; small calls are
repeated within a measurement. What was measured is kept in results/growth.json; ``--redraw`` draws the plot from it.

- add: one more profile into a bank, or one more adapter (``add_adapter``).
- find: whether a name is there.
- choose: ``set_profile``, or ``set_adapter``.
- mix: a forward pass of 8 x 16 tokens, each example another profile, none of which was used in the pass before.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import peft
import torch
from peft import LoraConfig, get_peft_model
from rich.table import Table
from timing import load_average, out, print_json, twin
from transformers import BertConfig, BertModel

from peft_xmask import ProfileBank, XPEFTConfig
from peft_xmask.core.packing import pack_bits, pack_halves

HERE = Path(__file__).resolve().parent
KEPT = HERE / "results" / "growth.json"
PLOT = HERE.parents[1] / "docs" / "images" / "growth.svg"
SHAPE = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
WHAT = ("add", "find", "choose", "mix")
LORA = dict(r=1, target_modules=["query", "value"])
ROWS = 8


def base_of():
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=1000, **SHAPE)).eval()


def bank_of(base, count):
    model = get_peft_model(twin(base), XPEFTConfig(task_type="FEATURE_EXTRACTION"))
    spec = model.masks("default").spec
    scores = torch.rand(1000, *spec.logits_shape[1:], generator=torch.Generator().manual_seed(1))
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(spec.top_k).indices, True)
    bits = pack_bits(chosen)[torch.arange(count) * 7919 % 1000]
    gains = pack_halves(torch.full((count, spec.num_sites, 1), spec.scale))
    return ProfileBank(model.peft_config["default"], bits, gains, [f"user-{row}" for row in range(count)])


def microseconds(run, times, rounds):
    """Median processor time of a call: of ``rounds`` measurements of ``times`` calls, after one that does not count."""
    found = []
    for measured in range(rounds + 1):
        start = time.process_time()
        for call in range(times):
            run(measured * times + call)
        found.append(1e6 * (time.process_time() - start) / times)
    return round(statistics.median(found[1:]), 2)


def of_bank(count, rounds):
    base = base_of()
    bank = bank_of(base, count)
    profile = bank["user-0"]
    model = bank.attach(twin(base))
    batch = {"input_ids": torch.randint(0, 1000, (ROWS, 16), generator=torch.Generator().manual_seed(2))}

    def mixed(turn):
        with torch.no_grad():
            model(**batch, adapter_names=[f"user-{(turn * ROWS + row) * 104729 % count}" for row in range(ROWS)])

    found = {
        "find": microseconds(lambda turn: f"user-{turn * 104729 % count}" in bank, 200, rounds),
        "choose": microseconds(lambda turn: model.set_profile(f"user-{turn * 104729 % count}"), 200, rounds),
        "mix": microseconds(mixed, 2, rounds),
        "add": microseconds(lambda turn: bank.add(f"new-{turn}", profile), 20, rounds),
    }
    return {what: found[what] for what in WHAT}


def of_loras(counts, rounds):
    """Of growing numbers of adapters in one model."""
    model = get_peft_model(base_of(), LoraConfig(**LORA), adapter_name="user-0").eval()
    batch = {"input_ids": torch.randint(0, 1000, (ROWS, 16), generator=torch.Generator().manual_seed(2))}
    found = {}
    for count in counts:
        held, last = len(model.peft_config), []
        for number in range(held, count):
            start = time.process_time()
            model.add_adapter(f"user-{number}", LoraConfig(**LORA))
            last.append(1e6 * (time.process_time() - start))
        model.eval()

        def mixed(turn, count=count):
            with torch.no_grad():
                model(**batch, adapter_names=[f"user-{(turn * ROWS + row) * 7919 % count}" for row in range(ROWS)])

        found[str(count)] = {
            "add": round(statistics.median(last[-9:]), 2),
            "find": microseconds(lambda turn, count=count: f"user-{turn % count}" in model.peft_config, 200, rounds),
            "choose": microseconds(lambda turn, count=count: model.set_adapter(f"user-{turn * 7 % count}"), 1, rounds),
            "mix": microseconds(mixed, 2, rounds),
        }
    return found


def draw(facts, path):
    """The four costs against how many are held."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "peft_xmask"
    figure, axes = plt.subplots(1, len(WHAT), figsize=(13, 3.4), sharey=True)
    for what, axis in zip(WHAT, axes, strict=True):
        for name, title, mark in (("bank", "profiles in a bank", "o-"), ("lora", "PEFT LoRA r=1", "s--")):
            counts = [int(count) for count in facts[name]]
            axis.plot(counts, [facts[name][str(count)][what] for count in counts], mark, label=title)
        axis.set(xscale="log", yscale="log", title=what, xlabel="held")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("microseconds of the processor")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def show(facts):
    table = Table(title="Microseconds of the processor, medians")
    for column in ("held", *WHAT):
        table.add_column(column, justify="left" if column == "held" else "right")
    for name, title in (("bank", "profiles"), ("lora", "LoRAs r=1")):
        for count, found in facts[name].items():
            table.add_row(f"{int(count):,} {title}", *(f"{found[what]:,.1f}" for what in WHAT))
    out().print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiles", type=int, nargs="+", default=[10, 1000, 100_000, 1_000_000])
    parser.add_argument("--loras", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--redraw", action="store_true", help="draw what is kept, measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.redraw:
        facts = json.loads(KEPT.read_text(encoding="utf-8"))
    else:
        facts = {"benchmark": "growth", "peft": peft.__version__, "torch": torch.__version__, "bank": {}}
        for count in options.profiles:
            facts["bank"][str(count)] = of_bank(count, options.rounds)
        facts["lora"] = of_loras(options.loras, options.rounds)
        facts["load_average"] = load_average()
        KEPT.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    draw(facts, PLOT)
    show(facts)
    print_json(facts)


if __name__ == "__main__":
    main()
