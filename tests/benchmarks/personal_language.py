"""What masks add to a language model's common part: ten domains of clinc150 as people, and a control with nobody.

The base is stories260k-llama, which has read only tales. Each domain gives 100 questions for training, 20 for
validation and 25 for the test. In the control the same questions are dealt out to ten people at random: whatever masks
still bring there is not personal. Prints nats per token of each layer on the test questions, and one JSON line.
"""

import argparse
import dataclasses
import gzip
import json
import random
import tempfile
from pathlib import Path

from rich.table import Table
from timing import load_average, out, print_json

from peft_xmask.people.personalize import personalize
from peft_xmask.people.settings import PersonalizeSettings
from peft_xmask.people.table import PeopleTable

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
TEXTS = {"train": 100, "validation": 20, "test": 25}


def write_table(data, path):
    with path.open("w", encoding="utf-8") as stream:
        for part, most in TEXTS.items():
            counts = {}
            with gzip.open(data / "clinc150" / f"{part}.jsonl.gz", "rt", encoding="utf-8") as lines:
                for line in lines:
                    row = json.loads(line)
                    counts[row["domain"]] = counts.get(row["domain"], 0) + 1
                    if counts[row["domain"]] <= most:
                        stream.write(json.dumps({"text": row["text"], "user": row["domain"], "split": part}) + "\n")


def dealt_out(table):
    draw = random.Random(0)
    parts = {}
    for part, rows in table.parts.items():
        names = [example.who for example in rows]
        draw.shuffle(names)
        parts[part] = [dataclasses.replace(each, who=name) for each, name in zip(rows, names, strict=True)]
    return dataclasses.replace(table, parts=parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--common-epochs", type=int, default=15)
    options = parser.parse_args()
    settings = PersonalizeSettings(max_length=64, layers=None, common_epochs=options.common_epochs)
    facts = {}
    with tempfile.TemporaryDirectory() as folder:
        write_table(options.data, Path(folder) / "texts.jsonl")
        table = PeopleTable.read(str(Path(folder) / "texts.jsonl"), task="causal-lm", split="split")
        for name, people in (("domains", table), ("dealt out at random", dealt_out(table))):
            done = personalize(options.data / "stories260k-llama", people, Path(folder) / name, settings)
            facts[name] = {layer.name: round(layer.overall, 3) for layer in done.report.layers}
            facts[name]["bytes"] = done.bank.nbytes
    shown = Table(title="nats per token on test questions")
    columns = ("base model", "common part", "+ mask")
    for column in ("people", *columns):
        shown.add_column(column)
    for name, found in facts.items():
        shown.add_row(name, *(f"{found[each]:.3f}" if each in found else "off" for each in columns))
    out().print(shown)
    print_json({**facts, "common_epochs": options.common_epochs, "load_average": load_average()})


if __name__ == "__main__":
    main()
