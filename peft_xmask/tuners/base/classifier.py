"""What an adapter's file says of the classification head that was trained with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.files import write_text
from ...errors import ConfigError

POOLINGS = ("mean", "model")
MODEL_TYPE = "pooled_classifier"
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Classifier:
    """How a head pools, and the names of its labels.

    Attributes:
        labels: a label number is an index into them.
        pooling: ``"mean"`` (:class:`~peft_xmask.integrations.pooled_classifier.MeanPooledClassifier`), or ``"model"``:
            the architecture's own.
        max_length: tokens after which texts were cut; None: not recorded.
        problem_type: as transformers' config has it; None: one label of several.
    """

    labels: tuple[str, ...]
    pooling: str = "mean"
    max_length: int | None = None
    problem_type: str | None = None

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ConfigError(f"pooling={self.pooling!r} is unknown: expected one of {', '.join(POOLINGS)}.")
        if not self.labels or not all(isinstance(name, str) for name in self.labels):
            raise ConfigError(f"Expected label names as a list of strings, found {self.labels!r}.")

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Classifier:
        """Read the ``classifier`` field of an adapter's config.

        Raises:
            ConfigError: fields that are missing, unknown, or have values of the wrong kind.
        """
        if not isinstance(fields, Mapping) or not isinstance(fields.get("labels"), list | tuple):
            raise ConfigError(f"Expected the fields of a classifier with a list of labels, found {fields!r}.")
        try:
            return cls(**{**fields, "labels": tuple(fields["labels"])})
        except TypeError as error:
            raise ConfigError(f"Expected the fields of a classifier, found others: {error}.") from error

    def to_fields(self) -> dict[str, Any]:
        """The fields as JSON has them; those that are not set are left out."""
        found = {"labels": list(self.labels), "pooling": self.pooling, "max_length": self.max_length}
        found["problem_type"] = self.problem_type
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def of(cls, model: Any) -> Classifier | None:
        """That of a model for sequence classification; None: it is none, or its labels have no names of their own."""
        config: Any = getattr(model, "config", None)
        names = getattr(config, "id2label", None)
        if not isinstance(names, Mapping) or not hasattr(config, "problem_type"):
            return None
        labels = tuple(str(names[number]) for number in sorted(names))
        return cls(labels, getattr(config, "head_pooling", "model"), None, config.problem_type)

    @property
    def has_names(self) -> bool:
        """Whether the labels have names other than the ones that transformers makes up."""
        return any(name != f"LABEL_{number}" for number, name in enumerate(self.labels))

    def give_to(self, model: Any) -> None:
        """Check a model that an adapter with this head is loaded onto, and name its labels if nobody has.

        Raises:
            ConfigError: it pools otherwise, or has the same labels in another order.
        """
        found = Classifier.of(model)
        if found is None:
            return
        if found.pooling != self.pooling:
            raise ConfigError(
                f"This adapter's head reads pooling={self.pooling!r}, the model at hand has {found.pooling!r}; its "
                "answers would be meaningless. Load the base with the adapter's own config: AutoModelForSequence"
                "Classification.from_pretrained(base, config=AutoConfig.from_pretrained(adapter))."
            )
        if len(found.labels) != len(self.labels):  # PEFT says so when it loads the head's weights
            return
        if set(found.labels) == set(self.labels) and found.labels != self.labels:
            raise ConfigError(
                f"The labels of this adapter are {list(self.labels[:5])}, those of the model at hand are the same in "
                f"another order: {list(found.labels[:5])}. Load the base with the adapter's own config."
            )
        if self.has_names and not found.has_names:
            model.config.id2label = dict(enumerate(self.labels))
            model.config.label2id = {name: number for number, name in enumerate(self.labels)}

    def config_fields(self) -> dict[str, Any]:
        """Fields of a :class:`~peft_xmask.PooledClassifierConfig`."""
        names = dict(enumerate(self.labels))
        fields: dict[str, Any] = {
            "architectures": ["MeanPooledClassifier"],
            "pooling": self.pooling,
            "text_length": self.max_length,
            "id2label": names,
            "label2id": {name: number for number, name in names.items()},
            "problem_type": self.problem_type,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def write_config(self, folder: Path) -> None:
        """Write the ``config.json`` beside an adapter by which transformers' Auto classes and pipelines find it."""
        fields = {"model_type": MODEL_TYPE, **self.config_fields()}
        write_text(folder / CONFIG_FILE, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")
