"""What it costs to search, check, compare and swap a very large bank. Prints a table and, last, one JSON line.

Peer of the search, measured in turn: all rows at once in NumPy (xor, ``bitwise_count``, sum). ``--profiles``: rows.
"""

import argparse
import tempfile
import time

import numpy as np
import torch
from peft import get_peft_model
from rich.table import Table
from timing import Summary, in_turn, load_average, out, paired_ratio, print_json, twin
from transformers import BertConfig, BertModel

from peft_xmask import ProfileBank, XPEFTConfig
from peft_xmask.core.packing import pack_bits, pack_halves
from peft_xmask.profiles import compare_banks, verify_bank

SHAPE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)


def all_different(base, profiles):
    """Random masks, 50 of 100 at 12 sites, no two alike."""
    model = get_peft_model(twin(base), XPEFTConfig(task_type="FEATURE_EXTRACTION", num_adapters=100))
    spec = model.masks("default").spec
    generator = torch.Generator().manual_seed(1)
    bits = torch.empty(profiles, *spec.bits_shape[1:], dtype=torch.uint8)
    for start in range(0, profiles, 4096):
        scores = torch.rand(min(4096, profiles - start), *spec.logits_shape[1:], generator=generator)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(spec.top_k).indices, True)
        bits[start : start + 4096] = pack_bits(chosen)
    gains = pack_halves(torch.full((profiles, spec.num_sites, 1), spec.scale))
    return ProfileBank(model.peft_config["default"], bits, gains, [f"user-{row}" for row in range(profiles)])


def at_once(bank, name, count):
    """The search as one would write it down."""
    rows = bank.content().bits.flatten(1).numpy().view(np.uint64)
    place = bank.content().names.find(name)
    distances = np.bitwise_count(rows ^ rows[place]).sum(1)
    nearest = np.argsort(distances, kind="stable")[: count + 1]
    return [(bank.name_at(int(row)), int(distances[row])) for row in nearest if row != place][:count]


def once(run):
    start = time.perf_counter()
    found = run()
    return found, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profiles", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--limit", type=float, default=60, help="seconds of searching")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = BertModel(BertConfig(vocab_size=1000, **SHAPE)).eval()
    with tempfile.TemporaryDirectory() as folder:
        all_different(base, options.profiles).save_pretrained(folder)
        bank, again = ProfileBank.from_pretrained(folder), ProfileBank.from_pretrained(folder)
        assert bank.similar("user-7", 10) == at_once(bank, "user-7", 10)
        searches = {"similar": lambda: bank.similar("user-7", 10), "at once": lambda: at_once(bank, "user-7", 10)}
        times = in_turn(searches, options.rounds, options.limit, lambda: None)
        found, verify_s = once(lambda: verify_bank(folder))
        assert found.total == 0
        different, compare_s = once(lambda: compare_banks(bank, again))
        assert not different
        model = bank.attach(twin(base))
        _, replace_s = once(lambda: again.replace(model))
        facts = {
            "profiles": options.profiles,
            "similar_ms": Summary.of([1e3 * each for each in times["similar"]]).as_dict(),
            "at_once_over_similar": paired_ratio(times, "at once", "similar").as_dict(),
            "verify_s": round(verify_s, 2),
            "compare_s": round(compare_s, 2),
            "replace_ms": round(1e3 * replace_s, 2),
            "load_average": load_average(),
        }
    console = out()
    table = Table(title=f"A bank of {options.profiles:,} profiles, 12 sites, N = 100, one thread")
    for column in ("what", "time"):
        table.add_column(column)
    each = facts["similar_ms"]
    low, high = each["interval"]
    table.add_row("similar(name, 10)", f"{each['median']:.0f} ms ({low:.0f} to {high:.0f})")
    each = facts["at_once_over_similar"]
    table.add_row("the same, all rows at once", f"{each['median']:.2f} times as long")
    table.add_row("verify", f"{verify_s:.1f} s")
    table.add_row("compare with itself", f"{compare_s:.1f} s")
    table.add_row("replace it in a model", f"{1e3 * replace_s:.1f} ms")
    console.print(table)
    print_json(facts)


if __name__ == "__main__":
    main()
