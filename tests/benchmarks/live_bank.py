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


class Both:
    """A live bank and a frozen one with the same profiles."""

    def __init__(self, folder, bank):
        begin = time.perf_counter()
        self.live = LiveBank.create(folder / "live", bank)
        self.create_s = time.perf_counter() - begin
        self.frozen = folder / "frozen"
        bank.save_pretrained(self.frozen)
        self.names, self.profile = list(bank), bank[next(iter(bank))]
        self.times = {kind: [] for kind in KINDS}

    def turn(self, number):
        """Measure each kind of call once; names are spread over the bank."""
        name, new = self.names[number * 7919 % len(self.names)], f"new {number}"
        self.times["get"].append(seconds(lambda: self.live.get(name)))
        self.times["put"].append(seconds(lambda: self.live.put(new, self.profile)))
        self.times["replace"].append(seconds(lambda: self.live.put(name, self.profile)))
        self.times["delete"].append(seconds(lambda: self.live.delete(new)))

    def save(self, number):
        edited = ProfileBank.from_pretrained(self.frozen)
        edited.add(f"new {number}", self.profile)
        self.times["frozen: add and save"].append(seconds(lambda: edited.save_pretrained(self.frozen)))

    def facts(self):
        size = (self.live._path).stat().st_size
        return {
            "create_s": self.create_s, "bytes": size,
            **{kind: Summary.of(each).as_dict() for kind, each in self.times.items()},
        }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profiles", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    base = BertModel(BertConfig(**SHAPE), add_pooling_layer=False)
    with tempfile.TemporaryDirectory() as folder:
        counts = (10, options.profiles)
        banks = [Both(Path(folder) / str(count), all_different(base, count)) for count in counts]
        for number in range(options.rounds):
            for bank in banks:  # in turn, since others use the disk too
                bank.turn(number)
        for number in range(5):
            for bank in banks:
                bank.save(number)
        found = {count: bank.facts() for count, bank in zip(counts, banks, strict=True)}
        for bank in banks:
            bank.live.close()
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
