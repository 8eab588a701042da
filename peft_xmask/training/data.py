"""The profiles a dataset names, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..bank.names import NameIndex, check_name
from ..errors import ConfigError


@dataclass(frozen=True)
class ProfileData:
    """Examples, and whose each of them is.

    Attributes:
        dataset: the examples.
        rows: long ``[n]``, the row of each example's profile.
        validation: other examples, or None.
        held_out: as ``rows``, of these.
        index: names of the rows, in the order in which they first come.
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
        """What a dataset, and perhaps one for validation, have.

        Raises:
            ConfigError: examples that cannot be looked up, or names that cannot be or are not known.
        """
        names = profiles_of(dataset, column)
        index = NameIndex.build(dict.fromkeys(names))
        rows = rows_of(names, index.find, "training")
        held_out = None
        if validation is not None:
            held_out = rows_of(profiles_of(validation, column), index.find, "validation")
        return cls(dataset, rows, validation, held_out, index, column)


def profiles_of(dataset: Any, column: str) -> list[str]:
    """The name of each example's profile.

    Raises:
        ConfigError: no length, no examples, no such column, or a name that is missing or cannot be.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ConfigError(
            f"Expected a dataset with a length, whose examples are found by number; found a {type(dataset).__name__}."
        )
    if not len(dataset):
        raise ConfigError("Expected a dataset with examples, found an empty one.")
    columns = getattr(dataset, "column_names", None) or sorted(dataset[0])
    if column not in columns:
        raise ConfigError(f"Expected a column '{column}' with the profile of each example, found {columns}.")
    if hasattr(dataset, "column_names"):
        names = list(dataset[column])
    else:
        names = [dataset[place].get(column) for place in range(len(dataset))]
    for place, name in enumerate(names):
        if not isinstance(name, str):
            raise ConfigError(
                f"Expected a name in the column '{column}' of each example, found {name!r} in example {place}. "
                "Names of profiles are strings: make them so (str(7) of the number 7), and drop examples without one."
            )
    for name in dict.fromkeys(names):
        check_name(name)
    return names


def rows_of(names: list[str], find: Callable[[str], int | None], what: str) -> Tensor:
    """Long ``[n]``, the row of each name.

    Raises:
        ConfigError: names that are not known.
    """
    rows = [find(name) for name in names]
    unknown = sorted({name for name, row in zip(names, rows, strict=True) if row is None})
    if unknown:
        raise ConfigError(
            f"Expected profiles of the training examples in the {what} examples, found others: "
            f"{', '.join(map(repr, unknown[:5]))}{' and others' if len(unknown) > 5 else ''}."
        )
    return torch.tensor(rows)
