"""Latency of docs/examples/serve.py against the number of distinct users in flight. Prints a table and one JSON line.

The server is a process of its own with the real MiniLM; ``--clients`` connections post one request after another, for
one user, for a few, or each for another one. Peer, in turn with it: the same server without batching.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from peft import get_peft_model
from rich.table import Table
from timing import load_average, out, print_json
from transformers import AutoModelForSequenceClassification

from peft_xmask import ProfileBank, XPEFTConfig
from peft_xmask.cli.demo import minilm_folder

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from test_serve import ask, load, server


def make_bank(users, folder):
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=5)
    model = get_peft_model(base, XPEFTConfig(task_type="SEQ_CLS", num_profiles=users))
    with torch.no_grad():
        model.masks("default").logits.weight.normal_(std=0.01)
    ProfileBank.from_model(model, [f"user-{number}" for number in range(users)]).save_pretrained(folder)


def percentiles(answers):
    milliseconds = sorted(1e3 * seconds for *_, seconds, _ in answers)
    cuts = statistics.quantiles(milliseconds, n=100)
    return {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98]}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=2000, help="profiles of the bank")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=4, help="of load in each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    distinct = [1, 4, options.clients, options.users]
    runs = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as servers:
        make_bank(options.users, folder)
        ports = {
            name: servers.enter_context(server(minilm_folder(), Path(folder), "--max-batch", batch))
            for name, batch in (("batched", 32), ("one by one", 1))
        }
        cases = [(name, count) for name in ports for count in distinct]
        draws = random.Random(0)
        for turn in range(options.rounds + 1):
            for name, count in draws.sample(cases, len(cases)):
                users = [f"user-{number}" for number in range(count)]
                answers = [
                    json.loads(line) for line in load(ports[name], options.clients, options.seconds, users).stdout
                ]
                assert {status for _, _, status, *_ in answers} == {200}
                if turn:  # the first round warms up
                    found = {**percentiles(answers), "per_second": len(answers) / options.seconds}
                    runs.setdefault((name, count), []).append(found)
        health = ask(ports["batched"], "GET", "/health")[1]
    facts = {"clients": options.clients, "profiles": options.users, "rounds": options.rounds, "cases": []}
    table = Table(title=f"{options.clients} clients, {options.users:,} profiles, MiniLM, {options.rounds} rounds")
    for column in ("server", "users in flight", "p50, ms", "p95, ms", "p99, ms", "requests/s", "p50 over one user's"):
        table.add_column(column)
    for (name, count), rounds in sorted(runs.items()):
        middle = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        ratios = [each["p50"] / one["p50"] for each, one in zip(rounds, runs[name, 1], strict=True)]
        low, middle_ratio, high = min(ratios), statistics.median(ratios), max(ratios)
        cells = [f"{middle[key]:.1f}" for key in ("p50", "p95", "p99", "per_second")]
        in_flight = min(count, options.clients)
        table.add_row(name, f"{in_flight} of {count:,}", *cells, f"{middle_ratio:.2f} ({low:.2f} to {high:.2f})")
        facts["cases"].append({"server": name, "users": count, **middle, "p50_ratio": [low, middle_ratio, high]})
    facts |= {"health": health, "load_average": load_average()}
    console = out()
    console.print(table)
    print_json(facts)


if __name__ == "__main__":
    main()
