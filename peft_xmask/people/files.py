"""Read columns of a table as they stand in the file: no guessing, and ``None`` or ``NA`` in a cell is text."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, FileFormatError, MissingExtraError

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
"""Kinds of file that are read; ``.gz`` may follow all but the last."""

_SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves in a folder
Columns = dict[str, list[Any]]
"""Values by column, in the order of the rows."""


def read_columns(source: str, wanted: Sequence[str], split: str = "train") -> Columns:
    """Read some columns of a file, or of a split of a dataset: one in a folder, or one on the Hub.

    A dataset's folder is what ``save_to_disk`` wrote, or files that ``datasets.load_dataset`` reads.

    Cells of a CSV file are strings; an empty one is None. Other values are as JSON or Parquet have them.

    Raises:
        MissingExtraError: a Parquet file or a Hub dataset without the package that reads it.
        FileFormatError: no such file, an unreadable one, one without rows, or a missing column.
        ConfigError: an unknown file ending, or a dataset or split that the Hub does not have.
    """
    path = Path(source)
    ending = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    is_file = path.exists() or ending.lower() in ENDINGS or source.count("/") > 1
    if path.is_dir():
        is_file = False
    columns = _read_file(path, ending.lower()) if is_file else _read_dataset(source, split)
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise FileFormatError(f"Expected a column '{missing[0]}' in '{source}', found columns {sorted(columns)}.")
    if not columns[wanted[0]]:
        raise FileFormatError(f"Expected rows in '{source}', found none.")
    return {name: columns[name] for name in wanted}


def _read_file(path: Path, ending: str) -> Columns:
    if not path.is_file():
        raise FileFormatError(f"Expected a data file at '{path}', found none. Check the path.")
    if ending not in ENDINGS:
        raise ConfigError(f"Expected a file ending among {', '.join(ENDINGS)} (and .gz), found '{path.name}'.")
    try:
        if ending == ".parquet":
            return _read_parquet(path)
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
        if ending == ".csv":
            return _read_csv(path, text)
        return _as_columns(path, _json_rows(path, text, whole=ending == ".json"))
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise FileFormatError(f"'{path}' cannot be read as UTF-8 text: {error}. Repair the file.") from error


def _read_csv(path: Path, text: str) -> Columns:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) != len(names):
            raise FileFormatError(f"Expected columns with different names in '{path}', found {names}.")
        columns: Columns = {name: [] for name in names}
        for row in reader:
            if len(row) != len(names):
                if not row:  # an empty line
                    continue
                raise FileFormatError(
                    f"Expected {len(names)} cells in line {reader.line_num} of '{path}', found {len(row)}. A text with "
                    "a comma, a quote or a line break has to stand in double quotes."
                )
            for name, cell in zip(names, row, strict=True):
                columns[name].append(cell or None)
    except csv.Error as error:
        raise FileFormatError(f"'{path}' cannot be read as CSV, line {reader.line_num}: {error}.") from error
    return columns


def _json_rows(path: Path, text: str, whole: bool) -> Iterator[tuple[int, Any]]:
    """Number and value of each row: of JSON Lines, or of a JSON list of objects."""
    if whole and text.lstrip().startswith("["):
        try:
            yield from enumerate(json.loads(text), 1)
        except ValueError as error:
            raise FileFormatError(f"'{path}' cannot be read as JSON: {error}.") from error
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise FileFormatError(f"'{path}' cannot be read as JSON Lines, line {number}: {error}.") from error


def _as_columns(path: Path, rows: Iterator[tuple[int, Any]]) -> Columns:
    columns: Columns = {}
    for place, (number, row) in enumerate(rows):
        if not isinstance(row, dict):
            raise FileFormatError(f"Expected an object in row {number} of '{path}', found {row!r:.60}.")
        for name in row:
            if name not in columns:
                columns[name] = [None] * place
        for name, values in columns.items():
            values.append(row.get(name))
    return columns


def _read_parquet(path: Path) -> Columns:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise _no_datasets() from error
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise FileFormatError(f"'{path}' cannot be read as Parquet: {error}. Repair the file.") from error
    return {name: table.column(name).to_pylist() for name in table.column_names}


def _read_dataset(source: str, split: str) -> Columns:
    try:
        import datasets
    except ImportError as error:
        raise _no_datasets() from error
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    folder = Path(source).is_dir()
    try:
        if any((Path(source) / name).is_file() for name in _SAVED):
            saved = datasets.load_from_disk(source)
            if isinstance(saved, dict) and split not in saved:
                raise ValueError(f"it has the splits {', '.join(saved)}")
            table = saved[split] if isinstance(saved, dict) else saved
        else:
            table = datasets.load_dataset(source, split=split)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        advice = "Check the split (--hub-split) and the files in the folder."
        if not folder:
            advice = (
                "It is no file here either: check the spelling of the path or the id and of the split, and that the "
                "Hub can be reached."
            )
        raise ConfigError(f"The dataset '{source}' (split '{split}') could not be read: {reason}. {advice}") from error
    columns: Columns = {}
    for name in table.column_names:
        names = getattr(table.features[name], "names", None)
        values = list(table[name])
        columns[name] = [names[value] if names and isinstance(value, int) else value for value in values]
    return columns


def _no_datasets() -> MissingExtraError:
    return MissingExtraError(
        "Reading Parquet files and Hub datasets needs the package `datasets`, which is not installed. "
        'Install it with: pip install "peft_xmask[data]"'
    )
