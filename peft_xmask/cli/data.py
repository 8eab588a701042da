"""Labelled texts from JSON Lines, CSV or Parquet files, or from a dataset on the Hub."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import FileFormatError
from ..people.files import read_columns

Rows = list[tuple[str, str]]
"""Pairs of a text and a label, as they stand in the file."""


def read_rows(source: str, text: str, label: str, split: str = "train") -> Rows:
    """Read two columns of a file, or of one split of a Hub dataset.

    Raises:
        MissingExtraError: the package that reads such a file is not installed.
        FileFormatError: the file is missing or unreadable, a column is missing, or a row has no text or label.
        ConfigError: an unknown file ending, or a dataset that the Hub does not have.
    """
    try:
        columns = read_columns(source, (text, label), split)
    except FileFormatError as error:
        if "Expected a column" not in str(error):
            raise
        raise FileFormatError(f"{error} Name the columns with --text and --label.") from error
    for number, (one_text, one_label) in enumerate(zip(columns[text], columns[label], strict=True), 1):
        if not isinstance(one_text, str) or _name(one_label) is None:
            raise FileFormatError(
                f"Expected a text in '{text}' and a string or whole number in '{label}' in row {number} of '{source}', "
                f"found {one_text!r} and {one_label!r}. Fill in or remove the row."
            )
    return [
        (one_text, str(_name(one_label))) for one_text, one_label in zip(columns[text], columns[label], strict=True)
    ]


def _name(label: object) -> str | None:
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return str(label) if isinstance(label, str | int) else None


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
