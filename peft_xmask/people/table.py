"""A table of people: texts, labels and names, checked cell by cell and split by person and time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, FileFormatError
from ..tuners.base.classifier import Classifier
from .cells import PARTS, CellProblems, label_in
from .files import read_columns

PROBLEMS = {
    "classification": "single_label_classification",
    "regression": "regression",
    "multi-label": "multi_label_classification",
}
"""Tasks with a classification head, and what transformers calls them."""
CAUSAL_LM = "causal-lm"
"""The task of a language model: to continue a text."""
TASKS = (*PROBLEMS, CAUSAL_LM)
FRACTIONS = (0.7, 0.1)
"""Shares of a person's examples, oldest first, for training and validation; the rest is for the test."""


@dataclass(frozen=True)
class Example:
    """A labelled text of a person.

    Attributes:
        text: as it stands in the table.
        label: number of the label; a value for regression; numbers of the labels for multi-label; for a language model
            what continues the text, or an empty string if the text itself is what is learnt.
        who: name of the person.
    """

    text: str
    label: int | float | str | tuple[int, ...]
    who: str


@dataclass(frozen=True)
class PeopleTable:
    """Labelled texts of people.

    Attributes:
        task: one of :data:`TASKS`.
        labels: names of the labels, in the order of their numbers; one name for regression; none for a language model.
        parts: examples by part, ``"train"``, ``"validation"`` and ``"test"``, each in the order of the table.
    """

    task: str
    labels: tuple[str, ...]
    parts: dict[str, list[Example]]

    @property
    def people(self) -> list[str]:
        """Names of the people with training examples, in the order in which they first come."""
        return list(dict.fromkeys(example.who for example in self.parts["train"]))

    @classmethod
    def read(
        cls,
        source: str,
        *,
        text: str = "text",
        label: str | None = None,
        who: str = "user",
        task: str = "classification",
        split: str | None = None,
        time: str | None = None,
        hub_split: str = "train",
    ) -> PeopleTable:
        """Read and check a table.

        Args:
            source: CSV, JSON Lines or Parquet file, folder of a dataset, or dataset on the Hub.
            text: column of texts.
            label: column of labels: names or whole numbers; numbers for regression; for multi-label a list, or names
                between ``|``; for a language model the text that completes ``text``. None: ``"label"``, or for a
                language model no column: it learns ``text`` itself.
            who: column of people: names or whole numbers.
            task: what is learnt.
            split: column that says which rows are for ``train``, ``validation`` and ``test``. None: the oldest 70 % of
                a person's rows are for training, the next 10 % for validation and the newest for the test.
            time: column of numbers or sortable strings, such as ISO dates, by which a person's rows are ordered. None:
                their order in the table.
            hub_split: split of a dataset.

        Raises:
            ConfigError: an unknown task.
            FileFormatError: cells that are missing or of the wrong kind, named by row and column; or a table from which
                nothing can be learnt.
        """
        if task not in TASKS:
            raise ConfigError(f"task={task!r} is unknown. Expected one of: {', '.join(TASKS)}.")
        optional = [name for name in (split, time) if name is not None]
        if label is None and task != CAUSAL_LM:
            label = "label"
        labelled = [] if label is None else [label]
        columns = read_columns(source, [text, who, *labelled, *optional], hub_split)
        problems = CellProblems(f"'{source}'")
        texts = [problems.text(number, text, cell) for number, cell in _numbered(columns[text])]
        people = [problems.person(number, who, cell) for number, cell in _numbered(columns[who])]
        raw: list[Any] = [""] * len(texts)
        if label is not None:
            raw = [label_in(problems, task, number, label, cell) for number, cell in _numbered(columns[label])]
        parts = [problems.part(number, split, cell) for number, cell in _numbered(columns[split])] if split else None
        if time is not None:
            for number, cell in _numbered(columns[time]):
                problems.time(number, time, cell, columns[time][0])
        problems.raise_any()
        names = () if label is None or task == CAUSAL_LM else _label_names(task, raw, label)
        numbers = {name: number for number, name in enumerate(names)}
        found = [
            Example(one, _number(task, value, numbers), person)
            for one, value, person in zip(texts, raw, people, strict=True)
        ]
        if parts is None:
            parts = _by_time(people, None if time is None else columns[time])
        table = {part: [each for each, its in zip(found, parts, strict=True) if its == part] for part in PARTS}
        if not table["train"]:
            raise FileFormatError(f"Expected rows for training in '{source}', found none.")
        return cls(task, names, table)


def of_person(name: str, examples: Sequence[tuple[str, object]], head: Classifier) -> list[tuple[str, Any]]:
    """Texts of one person and their labels as a model is trained on them.

    Args:
        name: of the person.
        examples: pairs of a text and a label, as a table would have them.
        head: whose labels they are.

    Raises:
        FileFormatError: a text or label that is unusable, named by its number.
    """
    task = {problem: task for task, problem in PROBLEMS.items()}.get(head.problem_type or "", "classification")
    problems = CellProblems(f"The list of examples of {name!r:.60}")
    numbers = {label: number for number, label in enumerate(head.labels)}
    found = []
    for row, (text, label) in enumerate(examples, 1):
        problems.text(row, "text", text)
        value = label_in(problems, task, row, "label", label)
        for each in value if task == "multi-label" else (value,) if task == "classification" else ():
            if each is not None and each not in numbers:
                problems.add(row, "label", f"one of {', '.join(head.labels[:10])}", each)
        found.append((text, value))
    problems.raise_any()
    if task == "multi-label":
        return [(text, [float(label in value) for label in head.labels]) for text, value in found]
    return [(text, value if task == "regression" else numbers[value]) for text, value in found]


def _numbered(cells: Iterable[Any]) -> Iterable[tuple[int, Any]]:
    return enumerate(cells, 1)


def _label_names(task: str, raw: Sequence[Any], column: str) -> tuple[str, ...]:
    if task == "regression":
        if len(set(raw)) < 2:
            raise FileFormatError(f"Expected different numbers in column '{column}', found {raw[0]} in every row.")
        return (column,)
    names = {name for label in raw for name in (label if task == "multi-label" else (label,))}
    if len(names) < 2:
        raise FileFormatError(f"Expected at least two different labels in column '{column}', found {sorted(names)}.")
    try:
        return tuple(sorted(names, key=int))
    except ValueError:
        return tuple(sorted(names))


def _number(task: str, value: Any, numbers: dict[str, int]) -> int | float | str | tuple[int, ...]:
    if task == CAUSAL_LM:
        return str(value)
    if task == "regression":
        return float(value)
    if task == "multi-label":
        return tuple(sorted({numbers[name] for name in value}))
    return numbers[value]


def _by_time(people: Sequence[str], times: Sequence[Any] | None) -> list[str]:
    """The part of each row: a person's oldest rows are for training, the newest for the test."""
    rows: dict[str, list[int]] = {}
    for row, person in enumerate(people):
        rows.setdefault(person, []).append(row)
    parts = [""] * len(people)
    for theirs in rows.values():
        ordered = theirs if times is None else sorted(theirs, key=lambda row: times[row])
        train, validation = (max(1, round(FRACTIONS[0] * len(ordered))), round(sum(FRACTIONS) * len(ordered)))
        for place, row in enumerate(ordered):
            parts[row] = PARTS[0] if place < train else PARTS[1] if place < validation else PARTS[2]
    return parts
