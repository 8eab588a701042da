"""What people get whom a served bank has never seen, by the product's own calls. Prints tables and a JSON line.

``personalize`` makes a bank of half of the people of a set, over a random pool or over one fitted to them; the people
held out are then taught one by one with ``LivePredictor.learn``, as ``peft-xmask serve --live`` does, from their oldest
5, 20 or 100 labels (or all they have before the last 30 %), and tested on the last 30 %. Over the fitted pool, several
strengths of the prior are tried. Beside it stand the common part, the person's offset alone, and as a control the
offset with the mask of the person taught before. Lines are kept in results/people-new.jsonl and not measured again;
``--redraw`` only prints them.
"""

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from people_data import film, lines_of, minilm, split
from people_report import RESULTS
from rich.table import Table
from timing import out, print_json

from peft_xmask import LiveBank
from peft_xmask.people.live import LivePredictor
from peft_xmask.people.personalize import personalize
from peft_xmask.people.settings import PersonalizeSettings
from peft_xmask.people.table import PeopleTable
from peft_xmask.training.learn import ProfileLearning

PATH = RESULTS / "people-new.jsonl"
TASKS = {"irony": ("classification", "nats"), "films": ("regression", "absolute error")}
MOST, TESTED, VALIDATION = 100, 40, 10  # labels of one person; every tenth one of the bank's people is for validation
COUNTS, STRENGTHS = (5, 20, MOST), (0.0, 1.0, 3.0, 10.0)
HELD = 32
OTHER = "change by another's mask"
WAYS = [("random", 3.0), *(("fit", strength) for strength in STRENGTHS)]


@dataclasses.dataclass(frozen=True)
class Person:
    """A person's texts and labels, oldest first."""

    said: list[tuple[str, object]]

    @property
    def train(self):
        return self.said[: round(0.7 * len(self.said))][:MOST]

    @property
    def test(self):
        return self.said[round(0.7 * len(self.said)) :][:TESTED]


@dataclasses.dataclass(frozen=True)
class People:
    """A set, as ``people_data.split`` takes it."""

    name: str
    persons: list[Person]


def load(name):
    if name == "irony":
        texts = [f"{row['post']}\n{row['reply']}" for row in lines_of(name, "texts")]
        rows = [(r["annotator"], r["order"], texts[r["id"]], str(r["label"])) for r in lines_of(name, "annotators")]
    else:
        rows = [(r["user"], r["order"], film(r), r["rating"]) for r in lines_of(name, "users")]
    found = {}
    for row in sorted(rows, key=lambda row: row[:2]):
        found.setdefault(row[0], []).append(row[2:])
    return People(name, [Person(said) for said in found.values()])


def bank_of(people, seed, pool, folder):
    """A live bank of the people who are not held out."""
    table = Path(folder) / "table.jsonl"
    parts = split(people, seed)
    with table.open("w", encoding="utf-8") as stream:
        for number in parts.learnt + parts.tuned:
            for place, (text, label) in enumerate(people.persons[number].train):
                part = "validation" if place % VALIDATION == VALIDATION - 1 else "train"
                row = {"text": text, "label": label, "user": str(number), "split": part}
                stream.write(json.dumps(row) + "\n")
    task = TASKS[people.name][0]
    settings = PersonalizeSettings(epochs=0, max_length=64, seed=seed)  # nobody asks for these people's own masks
    read = PeopleTable.read(str(table), task=task, split="split")
    made = personalize(minilm(), read, f"{folder}/bank", settings, pool=pool)
    LiveBank.create(f"{folder}/live", made.bank)
    return f"{folder}/live"


def figures(predictor, name, tests):
    """The figure of each test text."""
    answers = predictor.predict([text for text, _ in tests], who=name)
    if predictor.head.problem_type == "regression":
        return [abs(each.value - float(label)) for each, (_, label) in zip(answers, tests, strict=True)]
    return [-math.log(each.scores[label]) for each, (_, label) in zip(answers, tests, strict=True)]


def measure(people, seed, pool, missing, kept):
    """Teach everybody who is held out, at the strengths and from the numbers of labels that are missing."""
    with tempfile.TemporaryDirectory() as folder:
        live = bank_of(people, seed, pool, folder)
        for strength, counts in missing.items():
            if not counts:
                continue
            learning = ProfileLearning(prior_strength=strength)
            predictor = LivePredictor.open(live, minilm(), learning=learning)
            for count in counts:
                line = taught(predictor, people, seed, count)
                key = {"set": people.name, "seed": seed, "pool": pool, "strength": strength, "labels": count}
                keep(kept, key | line)


def taught(predictor, people, seed, count):
    common, offset, mask, other, kept, start = [], [], [], [], 0, time.process_time()
    learning, before = 0.0, None
    for number in split(people, seed).held[:HELD]:
        person = people.persons[number]
        common.append(statistics.mean(figures(predictor, None, person.test)))
        begun = time.process_time()
        profile = predictor.learn("new", person.train[:count])
        learning += time.process_time() - begun
        mask.append(statistics.mean(figures(predictor, "new", person.test)))
        off = dataclasses.replace(profile, gain_bits=torch.zeros_like(profile.gain_bits))
        kept += not torch.equal(off.gain_bits, profile.gain_bits)
        predictor.live.put("new", off)
        offset.append(statistics.mean(figures(predictor, "new", person.test)))
        if before is not None:
            predictor.live.put("new", dataclasses.replace(before, offset_bits=profile.offset_bits))
            other.append(statistics.mean(figures(predictor, "new", person.test)) - offset[-1])
        before = profile
    changes = torch.tensor(mask) - torch.tensor(offset)
    return {
        "people": len(common), "with a mask": kept, "payload_bytes": profile.nbytes,
        "common": round(statistics.mean(common), 4), "offset": round(statistics.mean(offset), 4),
        "mask": round(statistics.mean(mask), 4), "change": round(float(changes.mean()), 5),
        "error": round(float(changes.std()) / len(changes) ** 0.5, 5),
        OTHER: round(statistics.mean(other), 5),
        "seconds_each": round(learning / len(common), 2), "seconds": round(time.process_time() - start, 1),
    }  # fmt: skip


def keep(kept, line):
    kept.append(line)
    with PATH.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
    print(line, flush=True)


def spread(values):
    """Mean over seeds (lowest to highest)."""
    return f"{statistics.mean(values):+.4f} ({min(values):+.4f} to {max(values):+.4f})"


def table_of(kept, name):
    """Rows of a table: pool, number of labels, the layers below, and what masks change."""
    for (pool, strength), count in itertools.product(WAYS, COUNTS):
        wanted = (name, pool, strength, count)
        found = [line for line in kept if (line["set"], line["pool"], line["strength"], line["labels"]) == wanted]
        if found:
            layers = [f"{statistics.mean(line[layer] for line in found):.3f}" for layer in ("common", "offset")]
            changes = [spread([line[change] for line in found]) for change in ("change", OTHER)]
            yield "random" if pool == "random" else f"fitted, prior {strength:g}", str(count), *layers, *changes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pools", nargs="+", default=["random", "fit"], choices=["random", "fit"])
    parser.add_argument(
        "--strengths", nargs="+", type=float, default=[*STRENGTHS], help="of the prior over fitted pools"
    )
    parser.add_argument("--labels", nargs="+", type=int, default=[*COUNTS], choices=COUNTS)
    parser.add_argument("--redraw", action="store_true", help="print what has been measured, train nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    kept = [json.loads(line) for line in PATH.read_text("utf-8").splitlines()] if PATH.is_file() else []
    for name in options.sets:
        people = None if options.redraw else load(name)
        for seed in () if options.redraw else options.seeds:
            for pool in options.pools:
                there = {
                    (line["strength"], line["labels"])
                    for line in kept if (line["set"], line["seed"], line["pool"]) == (name, seed, pool)
                }  # fmt: skip
                missing = {
                    strength: [count for count in options.labels if (strength, count) not in there]
                    for way, strength in WAYS if way == pool and (pool == "random" or strength in options.strengths)
                }  # fmt: skip
                if any(missing.values()):
                    measure(people, seed, pool, missing, kept)
        shown = Table(title=f"{name}: {TASKS[name][1]} of people never seen")
        for column in ("pool", "labels", "common", "+ offset", "+ mask", "+ another's mask"):
            shown.add_column(column)
        for row in table_of(kept, name):
            shown.add_row(*row)
        out().print(shown)
    print_json({"benchmark": "people_new", "lines": len(kept)})


if __name__ == "__main__":
    main()
