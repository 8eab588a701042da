"""Labelled texts from JSON Lines, CSV or Parquet files, or from a dataset on the Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, FileFormatError, MissingExtraError

Rows = list[tuple[str, str]]
"""Pairs of a text and a label, as they stand in the file."""

BUILDERS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".parquet": "parquet"}
"""Reader of ``datasets`` by file ending; ``.gz`` may follow the ending of a text file."""


def read_rows(source: str, text: str, label: str, split: str = "train") -> Rows:
    """Read two columns of a file, or of one split of a Hub dataset.

    Raises:
        MissingExtraError: ``datasets`` is not installed.
        FileFormatError: no such file, one that cannot be read, a missing column, or a row without a text or label.
        ConfigError: an unknown file ending.
    """
    with tempfile.TemporaryDirectory() as cache:
        table = _load(source, split, cache)
        for name in (text, label):
            if name not in table.column_names:
                raise FileFormatError(
                    f"Expected a column '{name}' in '{source}', found columns {table.column_names}. "
                    "Name the columns with --text and --label."
                )
        texts, labels = list(table[text]), list(table[label])
        names = getattr(table.features[label], "names", None)
    if not texts:
        raise FileFormatError(f"Expected rows in '{source}', found none.")
    for number, (one_text, one_label) in enumerate(zip(texts, labels, strict=True), 1):
        if not isinstance(one_text, str) or not isinstance(one_label, str | int):
            raise FileFormatError(
                f"Expected a text in '{text}' and a string or whole number in '{label}' in row {number} of '{source}', "
                f"found {one_text!r} and {one_label!r}. Fill in or remove the row."
            )
    return [
        (one_text, names[one_label] if names and isinstance(one_label, int) else str(one_label))
        for one_text, one_label in zip(texts, labels, strict=True)
    ]


def label_names_of(rows: Rows) -> list[str]:
    """The distinct labels: by value if all are whole numbers, else by alphabet."""
    names = {label for _, label in rows}
    try:
        return sorted(names, key=int)
    except ValueError:
        return sorted(names)


def number_labels(rows: Rows, label_names: Sequence[str], source: str) -> list[tuple[str, int]]:
    """Pairs of a text and its label's place in ``label_names``.

    Raises:
        FileFormatError: a label that is not among them.
    """
    numbers = {name: number for number, name in enumerate(label_names)}
    unknown = sorted({label for _, label in rows} - set(numbers))
    if unknown:
        raise FileFormatError(
            f"Labels {unknown[:5]} of '{source}' are not among the {len(numbers)} labels trained on: "
            f"{list(label_names)[:5]}... Check --label, or train on data that has them."
        )
    return [(text, numbers[label]) for text, label in rows]


def _load(source: str, split: str, cache: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            "Reading data files needs the package `datasets`, which is not installed. "
            'Install it with: pip install "peft_xmask[data]"'
        ) from error
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    path = Path(source)
    ending = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if path.exists() or ending.lower() in BUILDERS or source.count("/") > 1:
        return _load_file(datasets, path, ending.lower(), cache)
    return datasets.load_dataset(source, split=split)


def _load_file(datasets: Any, path: Path, ending: str, cache: str) -> Any:
    if not path.is_file():
        raise FileFormatError(f"Expected a data file at '{path}', found none. Check the path.")
    if ending not in BUILDERS:
        raise ConfigError(f"Expected a file ending among {', '.join(BUILDERS)} (and .gz), found '{path.name}'.")
    try:
        return datasets.load_dataset(
            BUILDERS[ending], data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True
        )
    except (datasets.exceptions.DatasetsError, ValueError, TypeError, StopIteration) as error:
        reason = " ".join(str(error.__cause__ or error).split()).rstrip(".") or "it holds no rows"
        raise FileFormatError(f"'{path}' cannot be read as {BUILDERS[ending]}: {reason}. Repair the file.") from error
