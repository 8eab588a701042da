"""From a table of 1,000 people x 20 texts to a bank in one command, beside one LoRA for each person in one process.

People are pieces of 20 consecutive ratings of the real raters of MovieTweetings; where these do not suffice, pieces of
20 ratings of the file of other raters, who are several people each: they cost the same to train and are left out of the
comparison of errors. The LoRAs (rank 8, query and value of every block, and the head) start from the head that all
people share, as the bank's profiles do, and are trained in a plain loop, a batch a step, without a Trainer. Their
learning rate is the one with the smallest error on these people's validation ratings; only its time counts.

Rates are in people for each hour of one core (CPU time of the whole command, start and report included, against that of
the loop over LoRAs), so that other work on the machine does not count; minutes are those of the clock.

Prints a table and one JSON line. Errors are mean absolute errors on each person's newest ratings.
"""

import argparse
import csv
import gzip
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.table import Table
from timing import load_average, out, print_json

from peft_xmask.cli.demo import minilm_folder
from peft_xmask.integrations.pooled_classifier import PooledClassifierConfig, load_classifier
from peft_xmask.people.predictor import Predictor
from peft_xmask.people.table import PeopleTable

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
TEXTS = 20
RATES = (3e-4, 1e-3, 3e-3)
EPOCHS = 10
LENGTH = 32


def rows_of(path):
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            yield row, f"{row['title']}. {', '.join(row['genres'])}", row["rating"]


def pieces(data):
    """Names and ratings of people: pieces of one rater, then pieces of the others."""
    raters = {}
    for row, film, rating in rows_of(data / "users.jsonl.gz"):
        raters.setdefault(row["user"], []).append((row["order"], film, rating))
    for user, ratings in sorted(raters.items()):
        ratings.sort()
        for piece in range(len(ratings) // TEXTS):
            yield f"rater-{user}-{piece}", [each[1:] for each in ratings[piece * TEXTS : (piece + 1) * TEXTS]]
    others = [(film, rating) for _, film, rating in rows_of(data / "base.jsonl.gz")]
    for piece in range(len(others) // TEXTS):
        yield f"others-{piece}", others[piece * TEXTS : (piece + 1) * TEXTS]


def write_table(data, count, path):
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["film", "rating", "person"])
        for (name, ratings), _ in zip(pieces(data), range(count), strict=False):
            writer.writerows([[film, rating, name] for film, rating in ratings])


def errors(answers, examples):
    return [abs(answer - float(example.label)) for answer, example in zip(answers, examples, strict=True)]


def batch_of(tokenizer, examples):
    texts = [example.text for example in examples]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    return dict(batch), torch.tensor([float(example.label) for example in examples])


def lora_each(predictor, parts, rate):
    """Train one LoRA after another: seconds, and errors on validation and test."""
    base = load_classifier(predictor.base, PooledClassifierConfig.of(predictor.head))
    head = {key.rpartition(".")[2]: value for key, value in predictor.bank.shared.items()}
    found = {"validation": [], "test": []}
    seconds = 0.0
    for theirs in parts:
        batches = {part: batch_of(predictor.tokenizer, rows) for part, rows in theirs.items() if rows}
        start = time.process_time()
        with torch.no_grad():
            for name, value in head.items():
                getattr(base.classifier, name).copy_(value.float())
        targets = ["query", "value"]
        model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="SEQ_CLS"))
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=rate)
        model.train()
        for _ in range(EPOCHS):
            inputs, labels = batches["train"]
            optimizer.zero_grad()
            ((model(**inputs).logits.view(-1) - labels) ** 2).mean().backward()
            optimizer.step()
        seconds += time.process_time() - start
        model.eval()
        with torch.no_grad():
            for part in found:
                if part in batches:
                    inputs, labels = batches[part]
                    found[part] += (model(**inputs).logits.view(-1) - labels).abs().tolist()
        base = model.unload()
        base.requires_grad_(True)
        base.classifier = getattr(base.classifier, "original_module", base.classifier)
    return seconds, {part: sum(each) / len(each) for part, each in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--people", type=int, default=1000)
    parser.add_argument("--loras", type=int, default=60, help="people who also get a LoRA each; 0: nobody")
    parser.add_argument("--data", type=Path, default=DATA / "movietweetings-users")
    parser.add_argument("--epochs", type=float, help="passes for the masks; default: the command's")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path, bank = Path(folder) / "ratings.csv", Path(folder) / "bank"
        write_table(options.data, options.people, path)
        columns = ["--text", "film", "--label", "rating", "--who", "person", "--task", "regression"]
        more = [] if options.epochs is None else ["--epochs", str(options.epochs)]
        command = [sys.executable, "-m", "peft_xmask.cli", "personalize", "--base", str(minilm_folder()), "--json"]
        command += ["--data", str(path), *columns, "--out", str(bank), "--max-length", str(LENGTH), *more]
        start = time.perf_counter()
        report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        minutes = (time.perf_counter() - start) / 60
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        busy = used.ru_utime + used.ru_stime
        predictor = Predictor.from_pretrained(bank)
        table = PeopleTable.read(str(path), text="film", label="rating", who="person", task="regression")
        real = [name for name in table.people if name.startswith("rater-")]
        chosen = real[:: max(1, len(real) // max(1, options.loras))][: options.loras]
        parts = [
            {part: [each for each in rows if each.who == name] for part, rows in table.parts.items()} for name in chosen
        ]
        tested = [example for theirs in parts for example in theirs["test"]]
        answers = [
            answer.value for answer in predictor.predict([each.text for each in tested], [each.who for each in tested])
        ]
        common = [answer.value for answer in predictor.predict([each.text for each in tested])]
        ours = sum(errors(answers, tested)) / max(1, len(tested))
        shared = sum(errors(common, tested)) / max(1, len(tested))
        tried = {rate: lora_each(predictor, parts, rate) for rate in RATES} if options.loras else {}
    facts = {"people": options.people, "minutes": round(minutes, 2), "cpu_seconds": round(busy, 1), "report": report}
    print_json({**facts, "load_average": load_average()})
    if not tried:
        return
    rate = min(tried, key=lambda each: tried[each][1]["validation"])
    seconds, found = tried[rate]
    hourly = {"bank": 3600 * options.people / busy, "LoRA each": 3600 * len(chosen) / seconds}
    facts = {
        "people": options.people, "texts": TEXTS, "real": len(real), "minutes": round(minutes, 2),
        "cpu_seconds": round(busy, 1),
        "people_a_core_hour": {name: round(value) for name, value in hourly.items()},
        "ratio": round(hourly["bank"] / hourly["LoRA each"], 2), "compared": len(chosen), "test_ratings": len(tested),
        "error": {"common part": shared, "bank": ours, "LoRA each": found["test"]},
        "rate": rate, "layers": report["layers"], "masks": report["masks"], "load_average": load_average(),
        "threads": torch.get_num_threads(), "all_rates": {str(each): tried[each] for each in RATES},
    }  # fmt: skip
    shown = Table(title=f"{options.people:,} people x {TEXTS} texts in {minutes:.1f} min; {len(chosen)} compared")
    for column in ("", "people a core hour", "error"):
        shown.add_column(column)
    shown.add_row("common part", "-", f"{shared:.3f}")
    shown.add_row("bank", f"{hourly['bank']:,.0f}", f"{ours:.3f}")
    shown.add_row(f"LoRA each, rate {rate:g}", f"{hourly['LoRA each']:,.0f}", f"{found['test']:.3f}")
    out().print(shown)
    print_json(facts)


if __name__ == "__main__":
    main()
