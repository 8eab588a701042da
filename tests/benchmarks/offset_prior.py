"""How far an offset may go, and by which rule to choose that. Prints a table and, last, one JSON line. Two minutes.

*Irony*: a head and the variance of the offsets' prior come from half of the people, who have up to 100 labels each;
the others, whom nothing was fitted to, get an offset from their oldest 5, 20 or 100 labels and are tested on their
newest. Figures are nats, means over 32 people, for each variance among the candidates; beside them, which one is chosen
by the loss on validation labels of the first half, and which by the likelihood of their training labels.
"""

import argparse
import statistics

import torch
from people_data import minilm, split
from people_new import COUNTS, HELD, VALIDATION, load
from rich.table import Table
from timing import out, print_json

from peft_xmask.integrations.pooled_classifier import PooledClassifierConfig, load_classifier, load_tokenizer
from peft_xmask.people.common import SharedStates, fit_head
from peft_xmask.training.offset_prior import VARIANCES, likeliest_variance
from peft_xmask.training.offsets import SharedOutputs, fit_offsets
from peft_xmask.tuners.base.classifier import Classifier


class Bench:
    """States of all texts, and people's labels as numbers."""

    def __init__(self):
        self.people = load("irony")
        said = [each for person in self.people.persons for each in person.said]
        self.texts = {text: number for number, text in enumerate(sorted({text for text, _ in said}))}
        self.labels = {label: number for number, label in enumerate(sorted({label for _, label in said}))}
        head = Classifier(tuple(self.labels), "mean", 64, "single_label_classification")
        self.model = load_classifier(minilm(), PooledClassifierConfig.of(head))
        tokenizer = load_tokenizer(minilm())
        encoded = tokenizer(list(self.texts), truncation=True, max_length=64)
        rows = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
        with SharedStates(self.model, tokenizer, None) as shared:
            self.states = shared.of(rows)

    def part(self, said):
        """States and classes."""
        places = [self.texts[text] for text, _ in said]
        return self.states[places], torch.tensor([self.labels[label] for _, label in said])

    @torch.no_grad()
    def logits(self, states):
        return self.model.classifier(states).float()

    def fitted(self, seed):
        """The head of half of the people; which variance each rule chooses."""
        parts, found = split(self.people, seed), {}
        for name in ("train", "validation"):
            said, rows = [], []
            for row, number in enumerate(parts.learnt + parts.tuned):
                for place, each in enumerate(self.people.persons[number].train):
                    if (place % VALIDATION == VALIDATION - 1) == (name == "validation"):
                        said.append(each)
                        rows.append(row)
            found[name] = *self.part(said), torch.tensor(rows)
        zeros = {name: torch.zeros(len(states), len(self.labels)) for name, (states, _, _) in found.items()}
        fit_head(self.model, *((*found[name][:2], zeros[name]) for name in found))
        logits = {name: self.logits(states) for name, (states, _, _) in found.items()}
        (_, classes, rows), (_, tested, tested_rows) = found.values()

        shared = SharedOutputs(logits["train"], classes)

        def held_out(variance):
            offsets = fit_offsets(shared, rows, int(rows.max()) + 1, variance)
            return float(SharedOutputs(logits["validation"] + offsets[tested_rows], tested).losses().mean())

        return min(VARIANCES, key=held_out), likeliest_variance(shared, rows)

    def new(self, seed, count, variance):
        """Mean nats of people whom nothing was fitted to."""
        found = []
        for number in split(self.people, seed).held[:HELD]:
            person = self.people.persons[number]
            (states, classes), (test, wanted) = self.part(person.train[:count]), self.part(person.test)
            rows = torch.zeros(len(classes), dtype=torch.long)
            offset = fit_offsets(SharedOutputs(self.logits(states), classes), rows, 1, variance)
            found.append(float(SharedOutputs(self.logits(test) + offset, wanted).losses().mean()))
        return statistics.mean(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench, facts = Bench(), {"benchmark": "offset_prior"}
    table = Table(title="irony: nats of people never seen, by the variance of the offsets' prior")
    for column in ("seed", "labels", "no offset", *map(str, VARIANCES), "by validation", "by likelihood"):
        table.add_column(column)
    for seed in options.seeds:
        chosen = bench.fitted(seed)
        for count in COUNTS:
            nats = {variance: bench.new(seed, count, variance) for variance in (0.0, *VARIANCES)}
            facts[f"{seed}, {count}"] = {"nats": {v: round(each, 4) for v, each in nats.items()}, "chosen": chosen}
            picked = [f"{nats[variance]:.3f} ({variance:g})" for variance in chosen]
            table.add_row(str(seed), str(count), *(f"{each:.3f}" for each in nats.values()), *picked)
    out().print(table)
    print_json(facts)


if __name__ == "__main__":
    main()
