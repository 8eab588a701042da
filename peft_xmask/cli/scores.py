"""How good predictions are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Evaluation:
    """How well labels were predicted.

    Attributes:
        accuracy: share of correct predictions.
        macro_f1: mean over the classes (those that occur in labels or predictions) of ``2 tp / (2 tp + fp + fn)``.
        loss: mean cross-entropy, in nats.
        predictions: label number of each example, in their order.
    """

    accuracy: float
    macro_f1: float
    loss: float
    predictions: list[int]


def accuracy(labels: Sequence[int], predictions: Sequence[int]) -> float:
    """Share of predictions that equal their label."""
    return sum(map(int.__eq__, labels, predictions)) / len(labels)


def macro_f1(labels: Sequence[int], predictions: Sequence[int]) -> float:
    """Mean of ``2 tp / (2 tp + fp + fn)`` over the classes that occur among labels or predictions."""
    scores = []
    for label in set(labels) | set(predictions):
        hits = sum(truth == guess == label for truth, guess in zip(labels, predictions, strict=True))
        scores.append(2 * hits / (labels.count(label) + predictions.count(label)))
    return sum(scores) / len(scores)
