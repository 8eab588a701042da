"""What a bank of very many profiles costs to open, to switch in and to mix. Prints tables and, last, one JSON line.

Peers, measured in the same run and in turn: a bank of ten profiles, one profile for all rows, and PEFT's LoRA r=8 on
query and value with many adapters. "Kept": the same bank with ``cache_profiles``, all of the profiles having been used
before, or none of them. ``--profiles``: rows of the large bank.
"""

import argparse
import tempfile
import time
from itertools import product
from pathlib import Path

import peft
import torch
from peft import LoraConfig, get_peft_model
from rich.table import Table
from timing import Summary, in_turn, load_average, out, paired_ratio, print_json, progress, twin
from transformers import BertConfig, BertModel

from peft_xmask import ProfileBank, XPEFTConfig
from peft_xmask.core.packing import pack_bits, pack_halves

SHAPES = {
    "minilm": dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
    "bert-base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
}


def base_of(shape):
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=1000, **SHAPES[shape])).eval()


def config():
    return XPEFTConfig(task_type="FEATURE_EXTRACTION", num_adapters=100)


def random_masks(profiles, sites, num_adapters, top_k):
    scores = torch.rand(profiles, 2, sites, num_adapters, generator=torch.Generator().manual_seed(1))
    return pack_bits(torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(top_k).indices, True))


def bank_of(base, profiles, first=0):
    """Random masks: a thousand that differ, in an order that jumps. Names count from ``first``."""
    model = get_peft_model(twin(base), config())
    spec = model.masks("default").spec
    order = torch.arange(profiles) * 7919 % 1000
    bits = random_masks(1000, spec.num_sites, spec.num_adapters, spec.top_k)[order]
    gains = pack_halves(torch.full((profiles, spec.num_sites, 1), spec.scale))
    names = [f"user-{i}" for i in range(first, first + profiles)]
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
    models = {name: bank.attach(twin(base)) for name, bank in [*banks.items(), ("kept", banks["many"])]}
    models["kept"].cache_profiles(10**9)
    users = {"ten": 10, "many": len(banks["many"]), "kept": 64}
    lora = get_peft_model(twin(base), LoraConfig(r=8, target_modules=["query", "value"]), adapter_name="0")
    for i in range(1, loras):
        lora.add_adapter(str(i), LoraConfig(r=8, target_modules=["query", "value"]))
    turn = [0]

    def switched(name):
        def run(user=None):
            models[name].set_profile(f"user-{turn[0] * 7 % users[name] if user is None else user}")
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

    for user in range(users["kept"]):
        switched("kept")(user)
    candidates = {f"switch {name}": switched(name) for name in models}
    candidates["switch LoRA"] = lora_switched
    candidates["stay in a bank"] = still(twin_of_still(base, banks["ten"]))
    candidates["stay LoRA"] = still(lora)
    return in_turn(candidates, rounds, limit, lambda: turn.__setitem__(0, turn[0] + 1))


def twin_of_still(base, bank):
    model = bank.attach(twin(base), adapter_name="still")
    model.set_profile("user-1")
    return model


def mixing(base, bank, rows, length, rounds, limit):
    """Times of one forward pass, and bytes of what is kept."""
    batch = {"input_ids": torch.randint(0, 1000, (rows, length), generator=torch.Generator().manual_seed(3))}
    served, kept, new = (bank.attach(twin(base)) for _ in range(3))
    served.set_profile("user-0")
    lora = get_peft_model(twin(base), LoraConfig(r=8, target_modules=["query", "value"]), adapter_name="0").eval()
    for i in range(1, rows):
        lora.add_adapter(str(i), LoraConfig(r=8, target_modules=["query", "value"]))
    lora.eval()
    kept.cache_profiles(4 * 10**9)
    one = kept.masks("bank").cache.row_bytes
    for model in (kept, new):
        model.cache_profiles(rows * one)
    turn = [0]

    def names(first=0):
        return [f"user-{(first + i) * 104729 % len(bank)}" for i in range(rows)]

    def run(model, **kwargs):
        def forward():
            with torch.no_grad():
                model(**batch, **kwargs)

        return forward

    def new_each_time():
        run(new, adapter_names=names(turn[0] * rows))()

    candidates = {
        "one": run(served),
        "mixed": run(served, adapter_names=names()),
        "kept": run(kept, adapter_names=names()),
        "new": new_each_time,
        "loras": run(lora, adapter_names=[str(i) for i in range(rows)]),
    }
    times = in_turn(candidates, rounds, limit, lambda: turn.__setitem__(0, turn[0] + 1), warmup=1)
    return times, kept.masks("bank").cache.nbytes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profiles", type=int, default=1_000_000)
    parser.add_argument("--loras", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for each comparison")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[64, 8])
    parser.add_argument("--lengths", nargs="+", type=int, default=[32, 256])
    options = parser.parse_args()
    facts = {"benchmark": "profiles_at_scale", "peft": peft.__version__, "threads": torch.get_num_threads()}
    console = out()
    with progress() as bar, tempfile.TemporaryDirectory() as work:
        task = bar.add_task("bank", total=2 + len(options.shapes) * len(options.rows) * len(options.lengths))
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
            "kept": [a - b for a, b in zip(times["switch kept"], times["stay in a bank"], strict=True)],
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
            for rows, length in product(options.rows, options.lengths):
                times, kept_bytes = mixing(base, bank, rows, length, options.rounds, options.limit)
                facts["mixing"][f"{shape}, {rows} x {length}"] = {
                    "kept_bytes": kept_bytes,
                    **{
                        f"{name}_over_{peer}": paired_ratio(times, peer, name).as_dict()
                        for name in ("mixed", "kept", "new")
                        for peer in ("one", "loras")
                    },
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
    table = Table(title="Rows of as many profiles: throughput over")
    for column in ("batch", "how", "rows of one profile", "rows of as many LoRAs", "bytes kept"):
        table.add_column(column)
    how = {"mixed": "mixed", "kept": "kept, used before", "new": "kept, none used before"}
    for batch, each in facts["mixing"].items():
        for name, title in how.items():
            cells = [cell(each[f"{name}_over_{peer}"]) for peer in ("one", "loras")]
            table.add_row(batch, title, *cells, "" if name == "mixed" else f"{each['kept_bytes']:,}")
    console.print(table)


def cell(each):
    return f"{each['median']:.3f} ({each['interval'][0]:.3f} to {each['interval'][1]:.3f})"


if __name__ == "__main__":
    main()
