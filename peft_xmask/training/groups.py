"""The people or tasks of a dataset whose deviations a pool is fitted to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from ..errors import ConfigError
from .collator import LABELS
from .data import ProfileData
from .pool_settings import PoolFitting


@dataclass(frozen=True)
class Group:
    """Examples of a person or a task.

    Attributes:
        name: of the person or task.
        places: of its examples in the dataset.
        classes: bool ``[C]``, the labels that the examples have; None where the group learns below the shared head.
    """

    name: str
    places: list[int]
    classes: Tensor | None


def without(dataset: Any, names: tuple[str, ...], column: str) -> Any:
    """A dataset without the examples of some people or tasks.

    Raises:
        ConfigError: a name that has no examples, so that a misspelt one is not trained on.
    """
    if dataset is None or not names:
        return dataset
    found = ProfileData.of(dataset, None, column)
    rows = {found.index.find(name) for name in names}
    if None in rows:
        missing = [name for name in names if found.index.find(name) is None]
        raise ConfigError(
            f"Expected held_out= to name people or tasks of the column '{column}', found others: "
            f"{', '.join(map(repr, missing[:5]))}."
        )
    kept = [place for place, row in enumerate(found.rows.tolist()) if row not in rows]
    return dataset.select(kept) if hasattr(dataset, "select") else Subset(dataset, kept)


def groups_of(data: ProfileData, settings: PoolFitting, num_labels: int) -> list[Group]:
    """The groups with the most examples, in the order in which they first appear.

    Args:
        num_labels: of the model's head.

    Raises:
        ConfigError: fewer than two groups with enough examples, or ``group_head="own"`` without classes as labels.
    """
    counts = data.counts
    enough = (counts >= settings.min_examples).nonzero().view(-1)
    if len(enough) < 2:
        raise ConfigError(
            f"Expected at least two people or tasks with {settings.min_examples} examples in the column "
            f"'{data.column}', found {len(enough)} of {len(counts)}. Lower min_examples."
        )
    largest = enough[torch.argsort(counts[enough], descending=True, stable=True)][: settings.max_groups]
    places: dict[int, list[int]] = {int(row): [] for row in largest.sort().values}
    for place, row in enumerate(data.rows.tolist()):
        if row in places:
            places[row].append(place)
    classes = _classes(data, settings.group_head, num_labels)
    if classes is not None and int(classes[list(places)].sum(1).min()) < 2:
        raise ConfigError(
            'group_head="own" is invalid here: expected at least two labels in every group, found one with a single '
            'label, which is nothing to learn. Pass group_head="shared".'
        )
    return [
        Group(data.index.name(row), found, None if classes is None else classes[row]) for row, found in places.items()
    ]


def _classes(data: ProfileData, group_head: str | None, num_labels: int) -> Tensor | None:
    """Which labels each profile has, bool ``[U, C]``, where groups have heads of their own."""
    if group_head == "shared":
        return None
    labels = _labels(data.dataset, num_labels)
    if labels is None:
        if group_head == "own":
            raise ConfigError(
                'group_head="own" is invalid here: expected a class as the label of each example, found none. Pass '
                'group_head="shared".'
            )
        return None
    classes = torch.zeros(len(data.index), num_labels, dtype=torch.bool)
    classes[data.rows, labels] = True
    if group_head is None and (int(classes.sum(0).max()) > 1 or int(classes.sum(1).min()) < 2):
        return None
    return classes


def _labels(dataset: Any, num_labels: int) -> Tensor | None:
    """The class of each example, long ``[n]``; None if labels are anything else."""
    columns = getattr(dataset, "column_names", None) or sorted(dataset[0])
    column = next((name for name in LABELS if name in columns), None)
    if column is None:
        return None
    if hasattr(dataset, "column_names"):
        found = list(dataset[column])
    else:
        found = [dataset[place][column] for place in range(len(dataset))]
    values = [value.item() if isinstance(value, Tensor) and value.numel() == 1 else value for value in found]
    if not all(type(value) is int and 0 <= value < num_labels for value in values):
        return None
    return torch.tensor(values)
