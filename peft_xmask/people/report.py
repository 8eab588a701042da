"""How much each layer of a personalised model helps, for people with few and with many labels."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

MEASURES = {
    "classification": "accuracy",
    "regression": "mean absolute error",
    "multi-label": "share of labels right",
    "causal-lm": "nats per token",
}
"""What is measured of each task."""
ERRORS = (MEASURES["regression"], MEASURES["causal-lm"])
"""Measures of which a lower value is better."""
FEW = 20
"""Most training labels of a person with few of them."""


@dataclass(frozen=True)
class Layer:
    """The model up to one layer, on test examples.

    Attributes:
        name: name of the layer; each contains the layers above it.
        overall: mean over all test examples.
        few: mean over examples of people with at most ``Report.few_labels`` training labels; None: there are none.
        many: mean over examples of the other people; None: there are none.
        nbytes: bytes for each person.
    """

    name: str
    overall: float
    few: float | None
    many: float | None
    nbytes: int


@dataclass(frozen=True)
class Report:
    """The result of ``personalize``.

    Attributes:
        measure: what the layers' numbers are; see also :attr:`lower_is_better`.
        layers: from nothing personal to everything.
        people: number of people with training examples.
        served_by_common: people without a profile, because they have too few labels.
        masks: whether masks helped on validation examples; if not, their gains are zero.
        few_labels: the limit for "few" training labels.
        examples: number of examples in each part.
        bank_bytes: size of the bank's files.
        seconds: duration of the run.
    """

    measure: str
    layers: tuple[Layer, ...]
    people: int
    served_by_common: int
    masks: bool
    few_labels: int
    examples: Mapping[str, int]
    bank_bytes: int
    seconds: float

    @property
    def lower_is_better(self) -> bool:
        """Whether the measure is an error."""
        return self.measure in ERRORS

    @property
    def gain(self) -> float:
        """How much better everything personal is than the best layer that is the same for all; negative: worse."""
        same = [layer.overall for layer in self.layers if layer.nbytes == 0]
        difference = self.layers[-1].overall - (min(same) if self.lower_is_better else max(same))
        return -difference if self.lower_is_better else difference

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON."""
        return asdict(self)


def few_of(labels: Mapping[str, int]) -> int:
    """The most training labels of a person with few: :data:`FEW`, or the median if everybody has more."""
    return FEW if any(count <= FEW for count in labels.values()) else int(statistics.median(labels.values()))


def layer_of(
    name: str,
    scores: Sequence[float],
    people: Sequence[str],
    labels: Mapping[str, int],
    few: int,
    nbytes: int,
    weights: Sequence[float] | None = None,
) -> Layer:
    """Means of the scores of test examples.

    Args:
        name: of the layer.
        scores: of each example.
        people: whose each example is.
        labels: training labels of each person.
        few: most labels of a person with few.
        nbytes: of one person.
        weights: of the examples in the means, such as their tokens; None: all equal.
    """
    facts = list(zip(scores, weights or [1.0] * len(scores), people, strict=True))
    some = [(score, weight) for score, weight, person in facts if labels.get(person, 0) <= few]
    rest = [(score, weight) for score, weight, person in facts if labels.get(person, 0) > few]
    return Layer(name, _mean([*some, *rest]) or 0.0, _mean(some), _mean(rest), nbytes)


def _mean(values: Sequence[tuple[float, float]]) -> float | None:
    return sum(value * weight for value, weight in values) / sum(weight for _, weight in values) if values else None
