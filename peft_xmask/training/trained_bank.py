"""A bank that was just trained, and how each of its profiles did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..bank.bank import ProfileBank
from ..core.files import write_text

METRICS_FILE = "metrics.json"

Metrics = dict[str, dict[str, Any]]


class TrainedBank(ProfileBank):
    """A bank that was just trained.

    Attributes:
        metrics: of each trained profile: ``examples`` and ``validation_examples`` (counts); ``validation_loss`` of what
            is kept and ``shared_loss`` of the model without the profile's row; ``layers``, those that the profile keeps
            (``"mask"``); ``best_step``, of the optimizer, which the kept row is from, and ``stopped_step``. None where
            there is none, as without validation examples.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.metrics: Metrics = {}

    def joined_to(self, bank: ProfileBank) -> TrainedBank:
        """A bank with the profiles of both; ``bank`` is not modified."""
        content = bank.content()
        assert content.names is not None
        whole = TrainedBank(
            bank.config, content.bits, content.gain_bits, content.names, content.shared, content.offset_bits
        )
        for name in self:
            whole.add(name, self[name])
        whole.metrics = self.metrics
        return whole


def write_metrics(metrics: Metrics, folder: Path) -> None:
    """Write metrics to ``metrics.json`` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / METRICS_FILE, json.dumps(metrics, ensure_ascii=False, indent=1))


def read_metrics(folder: Path) -> Metrics:
    """Read what :func:`write_metrics` wrote."""
    found: Metrics = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
    return found
