"""The result of a comparison, as a table, a page or a plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.labels import place_labels
from ..errors import MissingExtraError
from .measure import Spread
from .page import Cell, Column, comparison_page, shortened
from .tables import csv_table, markdown_table


@dataclass(frozen=True)
class Row:
    """One method, measured.

    Attributes:
        name: of the row.
        method: PEFT type; empty for the base.
        error: why it could not be placed on the base; then nothing else is known.
        trainable_parameters: that a training step moves; of the base, all its parameters.
        stored_bytes: of the saved tensors, heads apart.
        file_bytes: of the adapter's file.
        flops_per_token: of a forward pass.
        inference_ratio: time of a forward pass over the base's.
        training_ratio: time of a training step over that of the base with all parameters trained.
        peak_bytes: of tensors that a training step makes.
        load_seconds: of ``PeftModel.from_pretrained``.
        switch_seconds: of ``set_adapter``.
    """

    name: str
    method: str
    error: str | None = None
    trainable_parameters: int | None = None
    stored_bytes: int | None = None
    file_bytes: int | None = None
    flops_per_token: float | None = None
    inference_ratio: Spread | None = None
    training_ratio: Spread | None = None
    peak_bytes: int | None = None
    load_seconds: float | None = None
    switch_seconds: float | None = None


def _milliseconds(value: float | None) -> float | None:
    return None if value is None else 1000 * value


_COLUMNS: tuple[tuple[str, str, Callable[[Row], Any]], ...] = (
    ("name", "method", lambda row: row.name),
    ("trainable_parameters", "trainable parameters", lambda row: row.trainable_parameters),
    ("stored_bytes", "bytes stored", lambda row: row.stored_bytes),
    ("file_bytes", "bytes of file", lambda row: row.file_bytes),
    ("flops_per_token", "FLOPs per token", lambda row: row.flops_per_token and round(row.flops_per_token)),
    ("inference_ratio", "inference time, x base", lambda row: row.inference_ratio),
    ("training_ratio", "training step, x base", lambda row: row.training_ratio),
    ("peak_bytes", "peak bytes of a step", lambda row: row.peak_bytes),
    ("load_ms", "load, ms", lambda row: _milliseconds(row.load_seconds)),
    ("switch_ms", "switch, ms", lambda row: _milliseconds(row.switch_seconds)),
    ("error", "why not", lambda row: row.error),
)


_MEANINGS: Mapping[str, Column] = {
    "name": Column("method", "The method, or the base with all its parameters trained."),
    "trainable_parameters": Column("trainable parameters", "Numbers that a training step changes."),
    "stored_bytes": Column(
        "stored", "Bytes of the saved tensors, without a classification head: what one more adapter costs.", "log"
    ),
    "file_bytes": Column("file", "Bytes of adapter_model.safetensors, with its header and any head."),
    "flops_per_token": Column("FLOPs per token", "Multiplications and additions of a forward pass, for each token."),
    "inference_ratio": Column("inference", "Time of a forward pass, in units of the base's own."),
    "training_ratio": Column(
        "training step", "Time of a training step, in units of one that trains all parameters of the base.", "linear"
    ),
    "peak_bytes": Column("peak of a step", "Most bytes of tensors alive at once that a training step makes."),
    "load_ms": Column("load", "Milliseconds of PeftModel.from_pretrained on a base in memory."),
    "switch_ms": Column("switch", "Milliseconds of set_adapter, from one loaded adapter to another."),
}


@dataclass(frozen=True)
class Comparison:
    """Rows of a comparison, the base first.

    Attributes:
        rows: one for each method.
        base: class of the base model.
        batch_shape: sequences and tokens of a step.
        repeats: rounds of timing.
    """

    rows: tuple[Row, ...]
    base: str
    batch_shape: tuple[int, ...]
    repeats: int

    @property
    def note(self) -> str:
        """How it was measured."""
        import peft
        import torch

        shape = " x ".join(map(str, self.batch_shape))
        return (
            f"Base: {self.base}, batch {shape}, PEFT {peft.__version__}, torch {torch.__version__}, "
            f"threads: {torch.get_num_threads()}. Times are ratios to the base's own in the same round, which trains "
            f"all its parameters: median (range) of {self.repeats} interleaved rounds. Loading and switching: the "
            "faster of a few."
        )

    def to_records(self) -> list[dict[str, Any]]:
        """Plain data, a row each; a ratio with its range is three numbers."""
        records = []
        for row in self.rows:
            record: dict[str, Any] = {}
            for key, _, read in _COLUMNS:
                value = read(row)
                if key.endswith("_ratio"):
                    record |= {key: value and value.middle, f"{key}_low": value and value.low}
                    record[f"{key}_high"] = value and value.high
                else:
                    record[key] = value
            records.append(record)
        return records

    def to_cells(self) -> list[dict[str, Any]]:
        """What a table for people shows: titles and values, without the columns that are empty."""
        return [{title: read(row) for _, title, read in self._columns()} for row in self.rows]

    def to_markdown(self) -> str:
        """A table in Markdown."""
        cells = self.to_cells()
        return markdown_table(list(cells[0]), [list(row.values()) for row in cells])

    def to_csv(self) -> str:
        """Comma-separated values."""
        records = self.to_records()
        return csv_table(list(records[0]), [list(record.values()) for record in records])

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame``.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingExtraError("to_pandas needs pandas: pip install pandas") from error
        return pandas.DataFrame.from_records(self.to_records())

    def to_html(self) -> str:
        """A page to send to others. It needs no other file, sorts by a click, and is readable on a phone."""
        columns = [column for column in self._columns() if column[0] in _MEANINGS]
        rows = [[_shown(key, read(row)) for key, _, read in columns] for row in self.rows if row.error is None]
        left_out = {row.name: row.error for row in self.rows if row.error is not None}
        meanings = [_MEANINGS[key] for key, _, _ in columns]
        return comparison_page(f"PEFT methods on {self.base}", self._lead(), self.note, meanings, rows, left_out)

    def _lead(self) -> str:
        """The extremes, in words."""
        measured = [row for row in self.rows if row.error is None and row.method]
        lead = [f"{len(measured)} methods, each added to the same {self.base} and measured in turn on one machine."]
        stored = [(row.stored_bytes, row.name) for row in measured if row.stored_bytes is not None]
        steps = [(row.training_ratio.middle, row.name) for row in measured if row.training_ratio is not None]
        if len(stored) > 1:
            least, most = min(stored), max(stored)
            lead.append(
                f"{least[1]} stores the least, {shortened(least[0], 'B').text}, and {most[1]} the most, "
                f"{shortened(most[0], 'B').text}."
            )
        if len(steps) > 1:
            fastest, slowest = min(steps), max(steps)
            lead.append(
                f"A training step takes from {fastest[0]:.2f} times ({fastest[1]}) to {slowest[0]:.2f} times "
                f"({slowest[1]}) as long as one that trains the whole base."
            )
        return " ".join(lead)

    def plot(self, path: str | Path | None = None) -> Any:
        """Bytes stored against the time of a training step, a point for each method.

        Args:
            path: where to save the picture; None: nowhere.

        Returns:
            a ``matplotlib`` figure.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingExtraError('plot needs matplotlib: pip install "peft_xmask[plot]"') from error
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        points, names = [], []
        for row in self.rows:
            if row.stored_bytes and row.training_ratio is not None:
                spread = row.training_ratio
                reach = [[spread.middle - spread.low], [spread.high - spread.middle]]
                axes.errorbar(
                    row.stored_bytes, spread.middle, yerr=reach, fmt="o", capsize=2, color="tab:blue", ecolor="0.7",
                    elinewidth=1, markersize=5,
                )  # fmt: skip
                points.append((row.stored_bytes, spread.middle))
                names.append(row.name)
        axes.axhline(1.0, linestyle=":", color="gray")
        axes.set_xscale("log")
        axes.margins(x=0.15, y=0.12)
        axes.set_xlabel("bytes stored")
        axes.set_ylabel("training step, relative to training the whole base")
        axes.set_title(f"PEFT methods on {self.base}")
        place_labels(figure, axes, points, names)
        if path is not None:
            figure.savefig(Path(path), dpi=150)
        return figure

    def _columns(self) -> list[tuple[str, str, Callable[[Row], Any]]]:
        return [column for column in _COLUMNS if any(column[2](row) is not None for row in self.rows)]


def _shown(key: str, value: Any) -> Cell:
    if isinstance(value, Spread):
        return Cell(value.middle, f"{value.middle:.2f} x", f"{value.low:.2f} to {value.high:.2f} times")
    if isinstance(value, str):
        return Cell(value, value)
    if key.endswith("_ms"):
        return Cell(None, "-") if value is None else Cell(value, f"{value:.3g} ms")
    return shortened(value, "B" if key.endswith("_bytes") else "")
