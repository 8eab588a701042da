"""What a bank of very many profiles costs to open, to switch in and to mix. Prints tables and, last, one JSON line.

Peers, measured in the same run and in turn: a bank of ten profiles, one profile for all rows, and PEFT's LoRA r=8 on
query and value with many adapters. ``--profiles``: rows of the large bank.
"""

import argparse
import tempfile
import time
from pathlib import Path

import peft
import torch
from peft import LoraConfig, get_peft_model
from rich.table import Table
from timing import Summary, in_turn, load_average, out, paired_ratio, print_json, progress, twin
from transformers import BertConfig, BertModel

from peft_xmask import ProfileBank, XPEFTConfig
from peft_xmask.packing import pack_bits, pack_halves

SHAPES = {
    "minilm": dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
    "bert-base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
}


def base_of(shape):
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=1000, **SHAPES[shape])).eval()


def config():
    return XPEFTConfig(task_type="FEATURE_EXTRACTION", num_adapters=100)


def bank_of(base, profiles):
    """Random masks: a thousand that differ, in an order that jumps."""
    model = get_peft_model(twin(base), config())
    spec = model.base_model.table.specs["default"]
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(1000, 2, spec.num_sites, spec.num_adapters, generator=generator)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(spec.top_k).indices, True)
    order = torch.arange(profiles) * 7919 % 1000
    bits, gains = pack_bits(chosen)[order], pack_halves(torch.full((profiles, spec.num_sites, 1), spec.scale))
    names = [f"user-{i}" for i in range(profiles)]
    return ProfileBank(model.peft_config["default"], bits, gains, names)


def resident():
    """Bytes of this process that are its own and those of mapped files, which the system can drop at any time."""
    with open("/proc/self/status", encoding="ascii") as stream:
        lines = dict(line.split(":", 1) for line in stream)
    return [int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")]


def opening(folder, count, rounds=20):
    """Milliseconds to open, microseconds to find a name, bytes that stay in memory after 64 profiles were read."""
    opens, finds, start = [], [], resident()
    for _ in range(rounds):
        begin = time.perf_counter()
        bank = ProfileBank.from_pretrained(folder)
        opens.append(1e3 * (time.perf_counter() - begin))
    wanted = [f"user-{i * 104729 % count}" for i in range(64)]
    for name in wanted:
        begin = time.perf_counter()
        assert name in bank
        finds.append(1e6 * (time.perf_counter() - begin))
        assert bank[name].nbytes
    own, mapped = (now - before for now, before in zip(resident(), start, strict=True))
    return bank, Summary.of(opens), Summary.of(finds), {"own": own, "mapped": mapped}


def switching(base, banks, loras, rounds, limit):
    """Times of a switch with the forward pass after it, and of such a pass without a switch."""
    batch = {"input_ids": torch.randint(0, 1000, (1, 16), generator=torch.Generator().manual_seed(2))}
    models = {name: bank.attach(twin(base)) for name, bank in banks.items()}
    lora = get_peft_model(twin(base), LoraConfig(r=8, target_modules=["query", "value"]), adapter_name="0")
    for i in range(1, loras):
        lora.add_adapter(str(i), LoraConfig(r=8, target_modules=["query", "value"]))
    turn = [0]

    def switched(name):
        count = len(banks[name])

        def run():
            models[name].set_profile(f"user-{turn[0] * 7 % count}")
            with torch.no_grad():
                models[name](**batch)

        return run

    def lora_switched():
        lora.set_adapter(str(turn[0] * 7 % loras))
        with torch.no_grad():
            lora.base_model.model(**batch)

    def still(model):
        def run():
            with torch.no_grad():
                model.base_model.model(**batch)

        return run

    for model in models.values():
        model.set_profile("user-0")
    candidates = {f"switch {name}": switched(name) for name in models}
    candidates["switch LoRA"] = lora_switched
    candidates["stay in a bank"] = still(twin_of_still(base, banks["ten"]))
    candidates["stay LoRA"] = still(lora)
    return in_turn(candidates, rounds, limit, lambda: turn.__setitem__(0, turn[0] + 1))


def twin_of_still(base, bank):
    model = bank.attach(twin(base), adapter_name="still")
    model.set_profile("user-1")
    return model


def mixing(base, bank, length, rounds, limit, rows=64):
    """Times of one forward pass over 64 rows."""
    batch = {"input_ids": torch.randint(0, 1000, (rows, length), generator=torch.Generator().manual_seed(3))}
    served = bank.attach(twin(base))
    served.set_profile("user-0")
    names = [f"user-{i * 104729 % len(bank)}" for i in range(rows)]
    lora = get_peft_model(twin(base), LoraConfig(r=8, target_modules=["query", "value"]), adapter_name="0").eval()
    for i in range(1, rows):
        lora.add_adapter(str(i), LoraConfig(r=8, target_modules=["query", "value"]))
    lora.eval()

    def run(model, **kwargs):
        def forward():
            with torch.no_grad():
                model(**batch, **kwargs)

        return forward

    candidates = {
        "one profile": run(served),
        "64 profiles": run(served, adapter_names=names),
        "64 LoRAs": run(lora, adapter_names=[str(i) for i in range(rows)]),
    }
    return in_turn(candidates, rounds, limit, lambda: None, warmup=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profiles", type=int, default=1_000_000)
    parser.add_argument("--loras", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for each comparison")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[32, 256])
    options = parser.parse_args()
    facts = {"benchmark": "profiles_at_scale", "peft": peft.__version__, "threads": torch.get_num_threads()}
    console = out()
    with progress() as bar, tempfile.TemporaryDirectory() as work:
        task = bar.add_task("bank", total=2 + len(options.shapes) * len(options.lengths))
        base = base_of("bert-base")
        bank_of(base, options.profiles).save_pretrained(work)
        file_bytes = {path.name: path.stat().st_size for path in Path(work).glob("*.safetensors")}
        bank, opened, found, memory = opening(work, options.profiles)
        facts["opening"] = {
            "profiles": len(bank), "masks_bytes": len(bank) * bank.nbytes, "open_ms": opened.as_dict(),
            "find_us": found.as_dict(), "resident_bytes": memory, "files": file_bytes,
        }  # fmt: skip
        bar.advance(task)
        base = base_of("minilm")
        banks = {"ten": bank_of(base, 10), "many": bank_of(base, options.profiles)}
        times = switching(base, banks, options.loras, options.rounds, options.limit)
        extra = {
            "ten": [a - b for a, b in zip(times["switch ten"], times["stay in a bank"], strict=True)],
            "many": [a - b for a, b in zip(times["switch many"], times["stay in a bank"], strict=True)],
            "LoRA": [a - b for a, b in zip(times["switch LoRA"], times["stay LoRA"], strict=True)],
        }
        facts["switching"] = {
            "milliseconds_extra": {k: Summary.of([1e3 * v for v in values]).as_dict() for k, values in extra.items()},
            "many_over_ten": paired_ratio(times, "switch many", "switch ten").as_dict(),
            "loras": options.loras,
        }
        bar.advance(task)
        facts["mixing"] = {}
        for shape in options.shapes:
            base = base_of(shape)
            bank = bank_of(base, options.profiles)
            for length in options.lengths:
                times = mixing(base, bank, length, options.rounds, options.limit)
                facts["mixing"][f"{shape}, 64 x {length}"] = {
                    "throughput_of_one_profile": paired_ratio(times, "one profile", "64 profiles").as_dict(),
                    "throughput_of_64_loras": paired_ratio(times, "64 LoRAs", "64 profiles").as_dict(),
                }
                bar.advance(task)
    facts["load_average"] = load_average()
    show(console, facts)
    print_json(facts)


def show(console, facts):
    opening, memory = facts["opening"], facts["opening"]["resident_bytes"]
    table = Table(title=f"A bank of {opening['profiles']:,} profiles, 12 sites, N = 100")
    for column in ("masks and gains a profile", "open", "find a name", "memory after 64 profiles"):
        table.add_column(column)
    table.add_row(
        f"{opening['masks_bytes'] / opening['profiles']:.0f} bytes", f"{opening['open_ms']['median']:.2f} ms",
        f"{opening['find_us']['median']:.1f} us",
        f"{memory['own'] / 1e6:.1f} MB, and {memory['mapped'] / 1e6:.1f} MB mapped",
    )  # fmt: skip
    console.print(table)
    table = Table(
        title=f"Switching, with the forward pass after it (MiniLM shape, 1 x 16; {facts['switching']['loras']} LoRAs)"
    )
    for column in ("what", "median", "95 % interval"):
        table.add_column(column)
    for name, each in facts["switching"]["milliseconds_extra"].items():
        table.add_row(
            f"extra, {name}", f"{each['median']:.2f} ms", f"{each['interval'][0]:.2f} to {each['interval'][1]:.2f}"
        )
    each = facts["switching"]["many_over_ten"]
    table.add_row("many over ten", f"{each['median']:.3f}", f"{each['interval'][0]:.3f} to {each['interval'][1]:.3f}")
    console.print(table)
    table = Table(title="64 rows of 64 profiles: throughput over")
    for column in ("shape", "64 rows of one profile", "64 rows of 64 LoRAs"):
        table.add_column(column)
    for name, each in facts["mixing"].items():
        cells = [
            f"{each[key]['median']:.3f} ({each[key]['interval'][0]:.3f} to {each[key]['interval'][1]:.3f})"
            for key in ("throughput_of_one_profile", "throughput_of_64_loras")
        ]
        table.add_row(name, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
