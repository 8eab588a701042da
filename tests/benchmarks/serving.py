"""The server of ``peft-xmask serve`` under load: wrong answers, latency and throughput, beside the base model alone.

64 clients (threads of one process, on the same cores) post one text after another as one of the bank's people or as
nobody, until 10,000 requests are answered. Each answer is compared with the one that the predictor gives in this
process, alone. The peer is the same server code around the same base and head without an adapter. The two take turns.

Prints a table and one JSON line.
"""

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from rich.table import Table
from timing import load_average, out, print_json

from peft_xmask import ProfileBank
from peft_xmask.cli.demo import film_table, minilm_folder
from peft_xmask.people.personalize import personalize
from peft_xmask.people.predictor import Predictor
from peft_xmask.people.settings import PersonalizeSettings

TOLERANCE = 2e-3  # batches of other sizes round differently


class BaseAlone(Predictor):
    """The base with the bank's head and no adapter: the same answer for everybody."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        state = {key.rpartition(".")[2]: value for key, value in self.bank.shared.items()}
        plain = self.model.unload()
        plain.classifier = getattr(plain.classifier, "original_module", plain.classifier)
        plain.classifier.load_state_dict(state)
        forward = plain.forward
        plain.forward = lambda adapter_names=None, **batch: forward(**batch)
        self.model = plain.eval()

    def _rows(self, people):
        return [None] * len(people)


def serve_base(bank, port):
    import uvicorn

    from peft_xmask.people.engine import Engine, ServerSettings
    from peft_xmask.people.server import create_app

    engine = Engine(BaseAlone.from_pretrained(bank), ServerSettings())
    uvicorn.run(create_app(engine), port=port, access_log=False, log_level="warning")


@contextmanager
def server(*command):
    import http.client

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, *map(str, command), "--port", str(port)])
    try:
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                connection.request("GET", "/health")
                connection.getresponse().read()
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait()


def clients(port, pairs, count, requests):
    """Runs in a process of its own: prints [pair, value, seconds] for each request."""
    import http.client

    turn, lock, lines = iter(range(requests)), threading.Lock(), []

    def one():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        while True:
            with lock:
                number = next(turn, None)
            if number is None:
                return
            place = (number * 7919) % len(pairs)
            text, who = pairs[place]
            body = json.dumps({"inputs": [{"text": text, "who": who}]})
            start = time.perf_counter()
            connection.request("POST", "/predict", body, {"content-type": "application/json"})
            response = connection.getresponse()
            found = json.loads(response.read())
            took = time.perf_counter() - start
            value = next(iter(found["answers"][0]["scores"].values())) if response.status == 200 else None
            lines.append([place, value, took])

    start = time.perf_counter()
    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"seconds": time.perf_counter() - start, "lines": lines}))


def measured(port, pairs_file, expected, count, requests):
    command = [sys.executable, __file__, "--clients-of", str(port), "--pairs", str(pairs_file)]
    command += ["--clients", str(count), "--requests", str(requests)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    wrong = sum(value is None or abs(value - expected[place]) > TOLERANCE for place, value, _ in found["lines"])
    cuts = statistics.quantiles((1e3 * took for *_, took in found["lines"]), n=100)
    return {
        "requests": len(found["lines"]), "wrong": wrong, "p50_ms": cuts[49], "p99_ms": cuts[98],
        "per_second": len(found["lines"]) / found["seconds"],
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=10_000, help="of each server, in all rounds together")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--bank", type=Path, help="of film ratings; default: one is trained on the demo's 60 people")
    parser.add_argument("--serve-base", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--clients-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--pairs", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_base:
        return serve_base(options.serve_base, options.port)
    if options.clients_of:
        return clients(options.clients_of, json.loads(options.pairs.read_text()), options.clients, options.requests)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        table = film_table(place, 60)
        bank = options.bank or place / "bank"
        if options.bank is None:
            settings = PersonalizeSettings(max_length=32, epochs=0.25)
            personalize(minilm_folder(), table, bank, settings)
        known = list(ProfileBank.from_pretrained(bank))
        films = [example.text for example in table.parts["test"][:50]]
        pairs = [(film, who) for film in films for who in [*known, None]]
        (place / "pairs.json").write_text(json.dumps(pairs))
        texts, people = zip(*pairs, strict=True)
        expected, answers = {}, {}
        for name, predictor in (("bank", Predictor), ("base alone", BaseAlone)):
            answers = predictor.from_pretrained(bank).predict(texts, people)
            expected[name] = [answer.value for answer in answers]
        apart = len({round(value, 2) for value in expected["bank"]})
        serving = ["-m", "peft_xmask.cli", "serve", "--bank", bank, "--workers", options.workers]
        found = {"bank": [], "base alone": []}
        with server(*serving) as ours, server(__file__, "--serve-base", bank) as theirs:
            for turn in range(options.rounds + 1):
                for name, port in (("bank", ours), ("base alone", theirs))[:: 1 if turn % 2 else -1]:
                    some = options.requests // options.rounds if turn else 200  # the first round warms up
                    run = measured(port, place / "pairs.json", expected[name], options.clients, some)
                    if turn:
                        found[name].append(run)
    facts = {"clients": options.clients, "workers": options.workers, "different_answers": apart, "servers": {}}
    shown = Table(title=f"{options.clients} clients, MiniLM, {len(known)} people, {options.rounds} rounds")
    for column in ("server", "requests", "wrong", "p50, ms", "p99, ms", "requests/s"):
        shown.add_column(column)
    for name, rounds in found.items():
        middle = {key: statistics.median(each[key] for each in rounds) for key in ("p50_ms", "p99_ms", "per_second")}
        total = {key: sum(each[key] for each in rounds) for key in ("requests", "wrong")}
        shown.add_row(name, *(f"{each:,}" for each in total.values()), *(f"{each:,.0f}" for each in middle.values()))
        facts["servers"][name] = {**total, **middle}
    ratios = [a["p50_ms"] / b["p50_ms"] for a, b in zip(found["bank"], found["base alone"], strict=True)]
    facts["p50_ratio"] = [min(ratios), statistics.median(ratios), max(ratios)]
    facts["load_average"] = load_average()
    out().print(shown)
    print_json(facts)
    return None


if __name__ == "__main__":
    main()
