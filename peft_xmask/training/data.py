"""The examples of a run and the profile of each, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..bank.names import NameIndex, as_name, check_name
from ..core.examples import fingerprint_examples
from ..errors import ConfigError


@dataclass(frozen=True)
class ProfileData:
    """Examples, and the profile of each.

    Attributes:
        dataset: the training examples.
        rows: long ``[n]``, the row of each example's profile.
        validation: the validation examples, or None.
        held_out: the same as ``rows``, for these.
        index: names of the rows, in the order in which they first appear.
        column: of the examples, with the name.
    """

    dataset: Any
    rows: Tensor
    validation: Any
    held_out: Tensor | None
    index: NameIndex
    column: str

    @classmethod
    def of(cls, dataset: Any, validation: Any, column: str) -> ProfileData:
        """Read the names in a dataset, and in one for validation if there is one.

        Raises:
            ConfigError: a dataset without a length, examples or the column; invalid names; or validation examples of
                profiles that have no training examples.
        """
        names = _names_in(dataset, column)
        index = NameIndex.build(dict.fromkeys(names))
        rows = _rows_of(names, index.find, "training")
        held_out = None
        if validation is not None:
            held_out = _rows_of(_names_in(validation, column), index.find, "validation")
        return cls(dataset, rows, validation, held_out, index, column)

    @cached_property
    def fingerprint(self) -> dict[str, str | None]:
        """Digests of the content of the training examples and of the validation examples."""
        return {
            "examples": fingerprint_examples(self.dataset),
            "validation": None if self.validation is None else fingerprint_examples(self.validation),
        }

    @cached_property
    def lengths(self) -> Tensor | None:
        """Tokens of each training example, long ``[n]``; None if the examples have no ``input_ids``."""
        return lengths_of(self.dataset, torch.arange(len(self.dataset)))

    @property
    def counts(self) -> Tensor:
        """Training examples of each profile, long ``[U]``."""
        return torch.bincount(self.rows, minlength=len(self.index))


def lengths_of(dataset: Any, places: Tensor) -> Tensor | None:
    """Tokens of some examples, long ``[n]``; None if the examples have no ``input_ids``."""
    if not len(places) or "input_ids" not in dataset[int(places[0])]:
        return None
    return torch.tensor([len(dataset[place]["input_ids"]) for place in places.tolist()])


def by_length(dataset: Any, places: Tensor) -> Tensor:
    """Places of examples, long ``[n]``, from the shortest to the longest; as they are if lengths are not known."""
    lengths = lengths_of(dataset, places)
    return places if lengths is None else places[torch.argsort(lengths, stable=True)]


def _names_in(dataset: Any, column: str) -> list[str]:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ConfigError(f"Expected a dataset with a length and examples by number, found a {type(dataset).__name__}.")
    if not len(dataset):
        raise ConfigError("Expected a dataset with examples, found an empty one.")
    columns = getattr(dataset, "column_names", None) or sorted(dataset[0])
    if column not in columns:
        raise ConfigError(f"Expected a column '{column}' with the profile of each example, found {columns}.")
    if hasattr(dataset, "column_names"):
        found = list(dataset[column])
    else:
        found = [dataset[place].get(column) for place in range(len(dataset))]
    names = []
    for place, value in enumerate(found):
        name = as_name(value.item() if isinstance(value, Tensor) and value.numel() == 1 else value)
        if not isinstance(name, str):
            raise ConfigError(
                f"Expected a name in the column '{column}' of each example, found {value!r} in example {place}. Names "
                "of profiles are strings or whole numbers; remove examples that have none."
            )
        names.append(name)
    for name in dict.fromkeys(names):
        check_name(name)
    return names


def _rows_of(names: list[str], find: Callable[[str], int | None], what: str) -> Tensor:
    rows = [find(name) for name in names]
    unknown = sorted({name for name, row in zip(names, rows, strict=True) if row is None})
    if unknown:
        raise ConfigError(
            f"Expected profiles of the training examples in the {what} examples, found others: "
            f"{', '.join(map(repr, unknown[:5]))}{' and others' if len(unknown) > 5 else ''}."
        )
    return torch.tensor(rows)
