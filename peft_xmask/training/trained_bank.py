"""A bank that was just trained, and how each of its profiles did."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..bank.bank import ProfileBank
from ..core.files import write_text

METRICS_FILE = "metrics.json"

Metrics = dict[str, dict[str, float | int | None]]


class TrainedBank(ProfileBank):
    """A bank that was just trained.

    Attributes:
        metrics: of each profile that was trained: ``examples`` and ``validation_examples`` (counts),
            ``validation_loss`` of the row that was kept, ``best_step`` it is from and ``stopped_step`` (steps of the
            optimizer); None where there is none, as without validation examples.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.metrics: Metrics = {}


def joined(bank: ProfileBank, trained: TrainedBank) -> TrainedBank:
    """The bank with the profiles that were trained; itself, it stays as it is."""
    content = bank.content()
    assert content.names is not None
    whole = TrainedBank(bank.config, content.bits, content.gain_bits, content.names, content.shared)
    for name in trained:
        whole.add(name, trained[name])
    whole.metrics = trained.metrics
    return whole


def write_metrics(metrics: Mapping[str, Any], folder: Path) -> None:
    """Write them to a folder, in ``metrics.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / METRICS_FILE, json.dumps(metrics, ensure_ascii=False, indent=1))


def read_metrics(folder: Path) -> Metrics:
    """What :func:`write_metrics` wrote."""
    found: Metrics = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
    return found
