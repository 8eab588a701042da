"""The content of a dataset as a fingerprint, read a block at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

_BLOCK = 1000


def fingerprint_examples(dataset: Any) -> str:
    """16 hexadecimal digits that change with any value of any example, with their order, and with the columns.

    Of a ``datasets.Dataset`` the stored columns are read, without transforms. Numbers, strings, bytes, arrays, tensors,
    and lists and mappings of them count by value; objects of other types count by the name of their type only.

    Args:
        dataset: anything with a length and examples by number.
    """
    hasher = hashlib.sha256()
    for block in _blocks(dataset):
        encoded = json.dumps(block, sort_keys=True, default=_plain, separators=(",", ":")).encode()
        hasher.update(len(encoded).to_bytes(8, "little"))
        hasher.update(encoded)
    return hasher.hexdigest()[:16]


def _blocks(dataset: Any) -> Iterator[Any]:
    if hasattr(dataset, "with_format") and hasattr(dataset, "iter"):
        for table in dataset.with_format("arrow").iter(_BLOCK):
            yield table.to_pydict()
        return
    for start in range(0, len(dataset), _BLOCK):
        rows = [dict(dataset[place]) for place in range(start, min(start + _BLOCK, len(dataset)))]
        columns = sorted({key for row in rows for key in row}, key=str)
        yield {str(key): [row.get(key) for row in rows] for key in columns}


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # arrays, tensors and their scalars
        return value.tolist()
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": hashlib.sha256(value).hexdigest()}
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if hasattr(value, "tobytes"):  # an image
        return {"bytes": hashlib.sha256(value.tobytes()).hexdigest()}
    return {"type": type(value).__name__}
