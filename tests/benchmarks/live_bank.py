"""What one change to a live bank costs, for ten profiles and for very many. Prints a table and, last, one JSON line.

Each change is on disk when the call returns. Peer, measured in turn: adding one profile to a frozen bank and saving it,
which writes everything anew. ``--profiles``: of the large bank.
"""

import argparse
import sqlite3
import tempfile
import time
from pathlib import Path

from bank_tools import SHAPE, all_different
from rich.table import Table
from timing import Summary, load_average, out, print_json
from transformers import BertConfig, BertModel

from peft_xmask import LiveBank, ProfileBank

KINDS = ("get", "put", "replace", "delete", "frozen: add and save")


def seconds(call):
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def measure(folder, bank, rounds):
    """Milliseconds of each kind of call, names spread over the bank."""
    start = time.perf_counter()
    live = LiveBank.create(folder / "live", bank)
    created = time.perf_counter() - start
    bank.save_pretrained(folder / "frozen")
    names, profile = list(bank), bank[next(iter(bank))]
    times = {kind: [] for kind in KINDS}
    for turn in range(rounds):
        name = names[turn * 7919 % len(names)]
        times["get"].append(seconds(lambda name=name: live.get(name)))
        times["put"].append(seconds(lambda turn=turn: live.put(f"new {turn}", profile)))
        times["replace"].append(seconds(lambda name=name: live.put(name, profile)))
        times["delete"].append(seconds(lambda turn=turn: live.delete(f"new {turn}")))
    for turn in range(5):
        edited = ProfileBank.from_pretrained(folder / "frozen")
        edited.add(f"new {turn}", profile)
        times["frozen: add and save"].append(seconds(lambda edited=edited: edited.save_pretrained(folder / "frozen")))
    size = (folder / "live" / "live_bank.sqlite").stat().st_size
    live.close()
    return {"create_s": created, "bytes": size, **{kind: Summary.of(each).as_dict() for kind, each in times.items()}}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profiles", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    base = BertModel(BertConfig(**SHAPE), add_pooling_layer=False)
    found = {}
    for count in (10, options.profiles):
        with tempfile.TemporaryDirectory() as folder:
            found[count] = measure(Path(folder), all_different(base, count), options.rounds)
    table = Table(title=f"One change to a live bank, milliseconds (SQLite {sqlite3.sqlite_version})")
    for column in ("call", *(f"{count:,} profiles" for count in found), "ratio of medians"):
        table.add_column(column)
    for kind in KINDS:
        small, large = (each[kind]["median"] for each in found.values())
        table.add_row(kind, f"{small:.3f}", f"{large:.3f}", f"{large / small:.2f}")
    out().print(table)
    facts = {"profiles": options.profiles, "calls": found, "sqlite": sqlite3.sqlite_version}
    print_json({**facts, "load_average": load_average()})


if __name__ == "__main__":
    main()
