"""Tokenised examples of people, and which of them have a profile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError
from .table import Example, PeopleTable

Row = dict[str, Any]
"""A tokenised text with ``labels`` and ``user``, the person's name."""


class PeopleExamples:
    """The examples of a table, tokenised, by part.

    Args:
        table: whose examples they are.
        rows: the tokenised examples of each part, in the table's order.
        min_labels: training examples that a person needs for a profile.

    Attributes:
        rows: see above.
        labels: training examples of each person.
        people: names of those who have a profile, in the order in which they first come.
        numbers: by part, long ``[n]``: number of each example's person in ``people``; -1: they have no profile.

    Raises:
        ConfigError: nobody has enough training examples.
    """

    def __init__(self, table: PeopleTable, rows: Mapping[str, Sequence[Row]], min_labels: int) -> None:
        self.rows = {part: list(each) for part, each in rows.items()}
        self.labels = Counter(example.who for example in table.parts["train"])
        self.people = [name for name, count in self.labels.items() if count >= min_labels]
        if not self.people:
            raise ConfigError(
                f"Expected a person with at least {min_labels} training labels, found none. Lower min_labels, or give "
                "people more labels."
            )
        numbers = {name: number for number, name in enumerate(self.people)}
        self.numbers = {
            part: torch.tensor([numbers.get(row["user"], -1) for row in each], dtype=torch.long)
            for part, each in self.rows.items()
        }

    def mine(self, part: str) -> Tensor:
        """Places of the examples whose people have a profile, long ``[m]``."""
        return (self.numbers[part] >= 0).nonzero().view(-1)

    def of_people(self, part: str) -> list[Row]:
        """The examples whose people have a profile."""
        return [self.rows[part][place] for place in self.mine(part).tolist()]


def by_length(examples: Sequence[Row], size: int = 64) -> Iterator[list[int]]:
    """Places of the examples, in batches of texts of similar length."""
    order = sorted(range(len(examples)), key=lambda place: len(examples[place]["input_ids"]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def inputs_of(example: Row) -> Row:
    """What a model reads of an example."""
    return {name: value for name, value in example.items() if name not in ("labels", "user")}


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, table: PeopleTable, examples: Sequence[Example], max_length: int
) -> list[Row]:
    """Tokenise labelled texts, for a classifier.

    Args:
        tokenizer: of the base.
        table: whose task the labels belong to.
        examples: in the order of the result.
        max_length: in tokens; longer texts are cut.
    """
    if not examples:
        return []
    encoded = tokenizer([each.text for each in examples], truncation=True, max_length=max_length)
    rows = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
    return [
        {**row, "labels": _target(table, example.label), "user": example.who}
        for row, example in zip(rows, examples, strict=True)
    ]


def _target(table: PeopleTable, label: Any) -> Any:
    if table.task == "multi-label":
        return [float(number in label) for number in range(len(table.labels))]
    return label
