"""Names of profiles, and an index that finds the row of a name in a mapped file.

``names[ends[i - 1] : ends[i]]`` is the name of row i in UTF-8. ``hashes`` holds the hashes of all names in ascending
order, and ``rows`` the row of each hash. The hash of a name is the first eight bytes of its BLAKE2b (digest size 8),
little-endian, signed.
"""

from __future__ import annotations

import hashlib
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, FileFormatError

BASE = "__base__"
"""PEFT's word for "no adapter", so a profile cannot have this name."""

MAX_BYTES = 1024
TENSORS: Mapping[str, torch.dtype] = {
    "hashes": torch.int64,
    "rows": torch.int32,
    "ends": torch.int64,
    "names": torch.uint8,
}


def as_name(name: Any) -> str:
    """A name as banks store it: a whole number becomes its decimal digits; anything else is unchanged."""
    if isinstance(name, numbers.Integral) and not isinstance(name, bool):
        return str(int(name))
    found: str = name
    return found


def as_names(names: object) -> list[str]:
    """Names for the rows of a bank.

    Raises:
        ConfigError: ``names`` is a single string or is not a sequence.
    """
    if isinstance(names, (str, bytes)) or not isinstance(names, Iterable):
        raise ConfigError(
            f"Expected a list of names, one for each profile, found {names!r}. Put a single name in a list."
        )
    return [as_name(name) for name in names]


def check_name(name: object) -> bytes:
    """The UTF-8 of a name.

    Raises:
        ConfigError: the name is ``"__base__"``, or is not a string of 1 to 1,024 bytes of UTF-8.
    """
    if not isinstance(name, str):
        raise ConfigError(f"Expected the name of a profile as a string or a whole number, found {name!r}.")
    try:
        encoded = name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"Expected a name that can be written in UTF-8, found {name!r}: {error.reason}.") from error
    if not 1 <= len(encoded) <= MAX_BYTES or name == BASE:
        shown = name if len(name) <= 40 else f"{name[:40]}..."
        raise ConfigError(
            f"Expected a name of 1 to {MAX_BYTES} bytes of UTF-8 other than '{BASE}', found {shown!r} of "
            f"{len(encoded)} bytes."
        )
    return encoded


class NameIndex:
    """Names in the order of their rows. Looking one up reads a few pages of the file, however many names there are.

    Args:
        tensors: by name, as in :data:`TENSORS`; all but ``names`` of length P.

    Raises:
        FileFormatError: other tensors, dtypes or lengths.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        found = {name: (tensor.dtype, tensor.dim()) for name, tensor in tensors.items()}
        lengths = {len(tensors[name]) for name in ("hashes", "rows", "ends") if name in tensors}
        if found != {name: (dtype, 1) for name, dtype in TENSORS.items()} or len(lengths) != 1:
            raise FileFormatError(
                f"Expected the tensors {', '.join(f'{k} ({v})' for k, v in TENSORS.items())} of one dimension and, but "
                f"for names, one length; found {found} with lengths {sorted(lengths)}. The file is damaged."
            )
        self.tensors = dict(tensors)
        self._hashes, self._rows, self._ends, self._names = (tensors[name].numpy() for name in TENSORS)
        if len(self) and int(self._ends[-1]) != len(self._names):
            raise FileFormatError(
                f"Expected {int(self._ends[-1])} bytes of names, found {len(self._names)}. The file is damaged."
            )

    @classmethod
    def build(cls, names: Iterable[str]) -> NameIndex:
        """An index of names, the first being that of row 0.

        Raises:
            ConfigError: an invalid name, or one that comes twice.
        """
        encoded = [check_name(name) for name in names]
        _refuse_twins(encoded)
        hashes = np.fromiter((hash_of(name) for name in encoded), dtype=np.int64, count=len(encoded))
        order = np.argsort(hashes, kind="stable")
        ends = np.cumsum(np.fromiter((len(name) for name in encoded), dtype=np.int64, count=len(encoded)))
        return cls(
            {
                "hashes": torch.from_numpy(hashes[order]),
                "rows": torch.from_numpy(order.astype(np.int32)),
                "ends": torch.from_numpy(ends.astype(np.int64)),
                "names": torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8)
                if encoded
                else torch.empty(0, dtype=torch.uint8),
            }
        )

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[str]:
        return (self.name(row) for row in range(len(self)))

    def name(self, row: int) -> str:
        """Name of a row.

        Raises:
            FileFormatError: its bytes are not UTF-8, or are outside the file.
        """
        start, end = int(self._ends[row - 1]) if row else 0, int(self._ends[row])
        if not 0 <= start < end <= len(self._names):
            raise FileFormatError(
                f"Expected a name for row {row}, found the bytes {start} to {end}. The file is damaged."
            )
        try:
            return self._names[start:end].tobytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise FileFormatError(f"Expected the name of row {row} in UTF-8, found other bytes: {error}.") from error

    def find(self, name: str) -> int | None:
        """Row of a name; None if there is no such name."""
        try:
            encoded = name.encode("utf-8")
        except (UnicodeEncodeError, AttributeError):
            return None
        wanted = np.int64(hash_of(encoded))
        at = int(np.searchsorted(self._hashes, wanted))
        while at < len(self._hashes) and self._hashes[at] == wanted:
            row = int(self._rows[at])
            if 0 <= row < len(self) and self._bytes(row) == encoded:
                return row
            at += 1
        return None

    def _bytes(self, row: int) -> bytes:
        start, end = int(self._ends[row - 1]) if row else 0, int(self._ends[row])
        found: bytes = self._names[start:end].tobytes()
        return found


def hash_of(encoded: bytes) -> int:
    """The hash of a name's UTF-8."""
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little", signed=True)


def _refuse_twins(encoded: Sequence[bytes]) -> None:
    if len(set(encoded)) == len(encoded):
        return
    first: dict[bytes, int] = {}
    for row, name in enumerate(encoded):
        if first.setdefault(name, row) != row:
            raise ConfigError(
                f"Expected each name once, found {name.decode()!r} for rows {first[name]} and {row}. Rename one."
            )
