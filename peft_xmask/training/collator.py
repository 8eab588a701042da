"""Collate batches with the profile of each example."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import nn

from ..bank.names import BASE, NameIndex, as_name
from ..errors import ConfigError

Example = Mapping[str, Any]
Collator = Callable[[list[dict[str, Any]]], Any]
LABELS = ("label", "label_ids", "labels")


class ProfileCollator:
    """Puts the rows of a batch's profiles beside what another collator makes of its examples.

    The batch gets ``adapter_names``, a LongTensor with the row of each example's profile (-1: none), which the forward
    of a model with ``XPEFTConfig(num_profiles=P)`` takes. So any loop that feeds batches to the model trains, or
    evaluates, mixed batches: the Trainer too.

    The Trainer drops columns that the model's forward does not name, before any collator sees them. Train with
    ``TrainingArguments(remove_unused_columns=False)``, and give ``model`` here: then the collator drops them, and
    keeps that of the profiles.

    Args:
        collator: of everything else, such as ``DataCollatorWithPadding(tokenizer)``.
        profiles: names of the rows, in order: a list, a bank, a :class:`~peft_xmask.bank.names.NameIndex`; or P,
            the number of rows, where examples have row numbers.
        column: of the examples, with a name (``"__base__"``: no adapter) or a row number (-1: none).
        model: whose forward says which other columns the inner collator gets; None: all of them.

    Raises:
        ConfigError: a name is invalid or occurs twice, or the number of rows is below 1.
    """

    def __init__(
        self,
        collator: Collator,
        profiles: NameIndex | Iterable[str] | int,
        *,
        column: str = "user",
        model: nn.Module | None = None,
    ) -> None:
        self.collator, self.column = collator, column
        self.kept = None if model is None else forward_columns(model)
        if isinstance(profiles, int):
            if profiles < 1:
                raise ConfigError(f"profiles={profiles} is invalid: expected at least one row.")
            self._index, self._count = None, profiles
        else:
            self._index = profiles if isinstance(profiles, NameIndex) else NameIndex.build(profiles)
            self._count = len(self._index)

    def __call__(self, features: Sequence[Example]) -> Any:
        """A batch of the inner collator's, and ``adapter_names``.

        Raises:
            ConfigError: an example without a profile, or with one that is unknown.
        """
        rows = torch.tensor([self.row(example, at) for at, example in enumerate(features)], dtype=torch.long)
        batch = self.collator([self._without_profile(example) for example in features])
        batch["adapter_names"] = rows
        return batch

    def row(self, example: Example, at: int = 0) -> int:
        """Row of an example's profile, -1 for none.

        Args:
            at: place of the example, to say in an error.

        Raises:
            ConfigError: no such column, nothing in it, or an unknown profile.
        """
        if self.column not in example:
            raise ConfigError(
                f"Expected the column '{self.column}' with the profile of each example, found {sorted(example)}. "
                "If the dataset has it, the Trainer dropped it: pass TrainingArguments(remove_unused_columns=False) "
                "and model=model to ProfileCollator."
            )
        found = example[self.column]
        value = found.item() if isinstance(found, torch.Tensor) and found.numel() == 1 else found
        row = self._number(value) if self._index is None else self._find(value)
        if row is None:
            known = f"rows from 0 to {self._count - 1} (-1: none)"
            if self._index is not None:
                known = f"one of {self._count} names, or '{BASE}' for no adapter"
            raise ConfigError(
                f"Expected in the column '{self.column}' {known}; found {value!r} in example {at} of a batch."
            )
        return row

    def _find(self, value: object) -> int | None:
        assert self._index is not None
        name = as_name(value)
        if not isinstance(name, str):
            return None
        return -1 if name == BASE else self._index.find(name)

    def _number(self, value: object) -> int | None:
        if value == BASE:
            return -1
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        return int(value) if whole and -1 <= int(value) < self._count else None  # type: ignore[call-overload]

    def _without_profile(self, example: Example) -> dict[str, Any]:
        wanted = example.keys() if self.kept is None else [key for key in example if key in self.kept]
        return {key: example[key] for key in wanted if key != self.column}


def forward_columns(model: nn.Module) -> frozenset[str]:
    """Columns that a model's forward names, and those of labels: what the Trainer would keep."""
    unwrapped: Any = model
    inner = unwrapped.get_base_model() if hasattr(model, "get_base_model") else unwrapped
    return frozenset([*inspect.signature(inner.forward).parameters, *LABELS])
