"""Profiles an hour *and* held-out accuracy, in one run, on real raters of films. Prints a table and one JSON line.

A person has their 20 oldest ratings; tested are their newest (the last 30 %, at most 40). The base is the real MiniLM
with a head that was fitted to other people's ratings; everything is adapted in the last third of the blocks.

- common part: the head, without anything personal.
- train_profiles: offset and mask, all people in one run, states before the adapted blocks cached; 16 of the 20 ratings
  train, and 4 choose how far masks go.
- LoRA r=8, one Trainer run after another in this process, which holds the base: from all 20 ratings. Its rate and
  number of epochs are those with the lowest error on other people, tuned before and not timed; beside them stand those
  with the lowest error among the fewest epochs. "Cached": from the same kept states. "On the offset": of the ratings
  less the person's offset.

Rates are per hour of one core (processor time), because wall time says little on a busy machine.
"""

import argparse
import itertools
import statistics
import tempfile
import time

import peft
import torch
from peft import LoraConfig, get_peft_model
from people_data import film, lines_of, minilm
from profiles_training import LAST, arguments
from rich.table import Table
from timing import load_average, out, print_json, twin
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, PrinterCallback, Trainer

from peft_xmask import XPEFTConfig
from peft_xmask.integrations.pooled_classifier import MeanPooledClassifier
from peft_xmask.people.common import SharedStates, fit_head
from peft_xmask.profiles import train_profiles
from peft_xmask.training.prefix import Prefix
from peft_xmask.training.states import ExamplesWithStates, StatesCollator, StatesRecorder, replaying

SAID, CHOOSE, TESTED, TOKENS, OTHERS = 20, 4, 40, 24, 1000
RATES, EPOCHS = (1e-3, 3e-3, 1e-2), (3, 10)


class People:
    """Raters with their examples, tokenised, and the base with a head fitted to others."""

    def __init__(self, count, tuned):
        self.tokenizer = AutoTokenizer.from_pretrained(minilm())
        self.collator = DataCollatorWithPadding(self.tokenizer)
        ratings = {}
        for row in lines_of("films", "users"):
            ratings.setdefault(row["user"], []).append((row["order"], film(row), float(row["rating"])))
        self.said, self.tested = {}, {}
        for user, mine in itertools.islice(sorted(ratings.items()), count + tuned):
            mine.sort()
            cut = round(0.7 * len(mine))
            self.said[f"user-{user}"] = [self.example(f"user-{user}", *each[1:]) for each in mine[:cut][:SAID]]
            self.tested[f"user-{user}"] = [self.example(f"user-{user}", *each[1:]) for each in mine[cut:][:TESTED]]
        self.names = list(self.said)[:count]
        self.tuned = list(self.said)[count:]
        backbone = AutoModel.from_pretrained(minilm())
        backbone.config.problem_type = "regression"
        self.base = MeanPooledClassifier(backbone, 1).eval()
        others = [self.example("", film(row), float(row["rating"])) for row in lines_of("films", "base")[:OTHERS]]
        with SharedStates(self.base, self.tokenizer, None) as states:
            found, labels = states.of(others), torch.tensor([each["labels"] for each in others])
        nothing = torch.zeros(len(labels), 1)
        parts = [(found[part], labels[part], nothing[part]) for part in (slice(200, None), slice(200))]
        fit_head(self.base, *parts)

    def example(self, name, text, rating):
        encoded = self.tokenizer(text, truncation=True, max_length=TOKENS)
        return {**encoded, "labels": rating, "user": name}

    def plain(self, examples, shift=0.0):
        kept = ("input_ids", "attention_mask", "labels")
        return [{**{key: each[key] for key in kept}, "labels": each["labels"] - shift} for each in examples]

    @torch.no_grad()
    def errors(self, model, examples, shift=0.0, **kwargs):
        """Absolute errors of a model's answers."""
        model.eval()
        batch = dict(self.collator(self.plain(examples)))
        labels = batch.pop("labels").float()
        return (model(**batch, **kwargs).logits.view(-1) + shift - labels).abs().tolist()


def together(people, epochs, folder):
    """All people in one run: processor seconds, and errors by person."""
    split = {part: [] for part in ("train", "validation")}
    for name in people.names:
        for number, each in enumerate(people.said[name]):
            split["validation" if number % (SAID // CHOOSE) == SAID // CHOOSE - 1 else "train"].append(each)
    start = time.process_time()
    bank = train_profiles(
        twin(people.base), split["train"], validation=split["validation"], head="frozen", offset=True, cache="auto",
        config=XPEFTConfig(task_type="SEQ_CLS", layers_to_transform=LAST), args=arguments(folder, epochs, 32),
        data_collator=people.collator, progress=False, sampling_temperature=1.0,
    )  # fmt: skip
    bank.save_pretrained(folder)
    seconds = time.process_time() - start
    model = bank.attach(twin(people.base))
    found = {n: people.errors(model, people.tested[n], adapter_names=[n] * len(people.tested[n])) for n in people.names}
    return seconds, found, bank


def one_lora(people, name, rate, epochs, folder, *, cached, shift=0.0):
    """One person's LoRA: processor seconds, and errors."""
    start = time.process_time()
    adapter = LoraConfig(
        r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS", layers_to_transform=LAST
    )
    model = get_peft_model(twin(people.base), adapter)
    data = people.plain(people.said[name], shift)
    args = arguments(folder, epochs, SAID)
    args.learning_rate, args.remove_unused_columns = rate, not cached
    prefix, collator = Prefix.of(model) if cached else None, people.collator
    if cached:
        states = StatesRecorder(model, prefix, collator, SAID, {}).states(data, None, "")
        data, collator = ExamplesWithStates(data, states), StatesCollator(collator)
    trainer = Trainer(model, args, train_dataset=data, data_collator=collator)
    trainer.remove_callback(PrinterCallback)
    with replaying(model, prefix):
        trainer.train()
    model.save_pretrained(folder)
    return time.process_time() - start, people.errors(model, people.tested[name], shift)


def mean(errors):
    """Mean over people of the mean error of each."""
    return round(statistics.mean(statistics.mean(each) for each in errors.values()), 4)


def tuned_lora(people, folder):
    """The rate and epochs with the lowest error on people who are not compared, also among the fewest epochs."""
    found = {}
    for rate, epochs in itertools.product(RATES, EPOCHS):
        errors = {name: one_lora(people, name, rate, epochs, folder, cached=True)[1] for name in people.tuned}
        found[rate, epochs] = mean(errors)
    quick = [setting for setting in found if setting[1] == min(EPOCHS)]
    told = {f"{rate:g} x {epochs}": error for (rate, epochs), error in found.items()}
    return min(found, key=found.get), min(quick, key=found.get), told


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=100)
    parser.add_argument("--tuned", type=int, default=8, help="people on whom LoRA's settings are chosen")
    options = parser.parse_args()
    torch.set_num_threads(1)
    people = People(options.people, options.tuned)
    rows, facts = {}, {"benchmark": "profiles_an_hour", "peft": peft.__version__, "people": len(people.names)}
    with tempfile.TemporaryDirectory() as folder:
        rows["common part"] = None, mean({n: people.errors(people.base, people.tested[n]) for n in people.names})
        for epochs in (1, 3):
            seconds, errors, bank = together(people, epochs, f"{folder}/bank-{epochs}")
            rows[f"train_profiles, epochs: {epochs}"] = seconds / len(people.names), mean(errors)
        facts["kept masks"] = sum("mask" in each["layers"] for each in bank.metrics.values())
        best, quick, facts["LoRA tuned"] = tuned_lora(people, f"{folder}/lora")
        offsets = {name: float(bank[name].offsets[0]) for name in people.names}
        ways = (("", False, False), (", cached", True, False), (" on the offset, cached", True, True))
        for (rate, epochs), (how, cached, on_offset) in itertools.product(dict.fromkeys((best, quick)), ways):
            title = f"LoRA each, {epochs} epochs at {rate:g}{how}"
            found = {
                name: one_lora(
                    people, name, rate, epochs, f"{folder}/lora", cached=cached, shift=offsets[name] * on_offset
                )
                for name in people.names
            }
            times = [each[0] for each in found.values()]
            rows[title] = statistics.median(times), mean({name: each[1] for name, each in found.items()})
    facts["rows"] = {
        name: {"an_hour": seconds and round(3600 / seconds), "error": error} for name, (seconds, error) in rows.items()
    }
    facts["load_average"] = load_average()
    table = Table(title=f"{len(people.names)} people, {SAID} ratings each")
    for column in ("", "profiles a core hour", "error, newest ratings"):
        table.add_column(column)
    for name, row in facts["rows"].items():
        table.add_row(name, "-" if row["an_hour"] is None else f"{row['an_hour']:,}", f"{row['error']:.3f}")
    out().print(table)
    print_json(facts)


if __name__ == "__main__":
    main()
