"""Safetensors files: mapped into memory through a single open, and written front to back from streams of rows.

The reader of the safetensors package opens a path twice, once for the header and once for the tensors. If another
process replaces the file in between, the two do not belong together. Here everything comes from one open file, which
stays whole for as long as a tensor of it is alive, whatever happens to its name.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FileFormatError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of dtypes in the format."""

ZEROS = "0" * 64
"""What a digest is while it is not yet known."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class MappedTensors:
    """The content of one safetensors file. Pages are read when they are touched.

    Attributes:
        tensors: by name. Writing to them changes this process's copy, never the file.
        metadata: strings of the header.
        header: the header's bytes, with its padding.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    header: bytes
    _mapped: mmap.mmap = field(repr=False)

    def data_sha256(self) -> str:
        """SHA-256 of everything after the header. Reads the whole file."""
        with memoryview(self._mapped) as content, content[8 + len(self.header) :] as data:
            return hashlib.sha256(data).hexdigest()


def map_tensors(path: Path) -> MappedTensors:
    """Map a safetensors file into memory.

    Raises:
        FileFormatError: there is no such file, or its header does not describe exactly its bytes.
    """
    if not path.is_file():
        raise FileFormatError(f"Expected a safetensors file at '{path}', found none. Check the path.")
    size = 0
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        header = _header(mapped)
        tensors, metadata = _parsed(mapped, header)
    except (OSError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise FileFormatError(
            f"'{path}' ({size} bytes) is not a readable safetensors file: {error}. "
            "It may be truncated or damaged; fetch or write it again."
        ) from error
    return MappedTensors(tensors, metadata, header, mapped)


def write_tensor_stream(
    path: Path,
    fixed: Mapping[str, Tensor],
    rows: Mapping[str, tuple[tuple[int, ...], Iterable[Tensor]]],
    metadata: Mapping[str, str],
    data_digest: str | None = None,
    header_digest: str | None = None,
) -> None:
    """Write a safetensors file. Tensors that are held come first, the most aligned ones in front; then streams of rows.

    Args:
        fixed: tensors by name.
        rows: uint8 tensors by name, each with its shape and its rows in blocks.
        metadata: strings of the header.
        data_digest: key of the metadata that is to hold the SHA-256 of all bytes after the header.
        header_digest: key that is to hold the SHA-256 of the header in which the 64 digits of this key are zeros.
    """
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in fixed.items()}
    ready = dict(sorted(ready.items(), key=lambda item: (-item[1].element_size(), item[0])))
    digests = [key for key in (data_digest, header_digest) if key is not None]
    header: dict[str, Any] = {_METADATA: {**metadata, **dict.fromkeys(digests, ZEROS)}}
    at = 0
    for name, tensor in ready.items():
        header[name] = _entry(_NAMES[tensor.dtype], tuple(tensor.shape), at, at := at + tensor.nbytes)
    for name, (shape, _) in rows.items():
        header[name] = _entry("U8", shape, at, at := at + prod(shape))
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    hasher = hashlib.sha256()
    with path.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for block in _in_order(ready, rows):
            content = memoryview(block.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
            hasher.update(content)
            stream.write(content)
        if data_digest is not None:
            encoded = _with_value(encoded, data_digest, hasher.hexdigest())
        if header_digest is not None:
            encoded = _with_value(encoded, header_digest, hashlib.sha256(encoded).hexdigest())
        stream.seek(8)
        stream.write(encoded)


def header_sha256(header: bytes, key: str, value: str) -> str:
    """SHA-256 of a header in which the value of ``key`` is zeros: what ``write_tensor_stream`` writes there."""
    return hashlib.sha256(header.replace(_pair(key, value), _pair(key, ZEROS), 1)).hexdigest()


def _in_order(
    fixed: Mapping[str, Tensor], rows: Mapping[str, tuple[tuple[int, ...], Iterable[Tensor]]]
) -> Iterable[Tensor]:
    yield from (tensor for tensor in fixed.values() if tensor.numel())
    for _, blocks in rows.values():
        yield from (block.contiguous() for block in blocks if block.numel())


def _pair(key: str, value: str) -> bytes:
    return f'"{key}":"{value}"'.encode()


def _with_value(header: bytes, key: str, value: str) -> bytes:
    return header.replace(_pair(key, ZEROS), _pair(key, value), 1)


def _entry(dtype: str, shape: tuple[int, ...], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def _header(mapped: mmap.mmap) -> bytes:
    length = int.from_bytes(mapped[:8], "little")
    if len(mapped) < 8 or length > min(_LARGEST_HEADER, len(mapped) - 8):
        raise ValueError(f"its header would be {length} bytes long")
    return mapped[8 : 8 + length]


def _parsed(mapped: mmap.mmap, header: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_without_twins)
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    if not isinstance(entries, dict):
        raise ValueError("its header is not a JSON object")
    metadata = entries.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not strings")
    begin, at = 8 + len(header), 0
    tensors = {}
    for name, entry in sorted(entries.items(), key=lambda item: _offsets(item[0], item[1])):
        dtype, shape, (start, end) = _dtype(name, entry), _shape(name, entry), _offsets(name, entry)
        if start != at or end - start != prod(shape) * dtype.itemsize:
            raise ValueError(f"tensor '{name}' of shape {shape} does not fit into its bytes, {start} to {end}")
        if end > len(mapped) - begin:
            raise ValueError(f"tensor '{name}' ends at byte {end} of {len(mapped) - begin}")
        tensors[name] = _tensor(mapped, dtype, shape, begin + start)
        at = end
    if at != len(mapped) - begin:
        raise ValueError(f"its tensors take {at} of {len(mapped) - begin} bytes")
    return tensors, metadata


def _tensor(mapped: mmap.mmap, dtype: torch.dtype, shape: list[int], offset: int) -> Tensor:
    count = prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    if offset % dtype.itemsize:  # other writers need not align
        content = bytearray(mapped[offset : offset + count * dtype.itemsize])
        return torch.frombuffer(content, dtype=dtype, count=count).view(shape)
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset).view(shape)


def _dtype(name: str, entry: Any) -> torch.dtype:
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"tensor '{name}' is of an unknown dtype, {dtype!r}")
    return DTYPES[dtype]


def _shape(name: str, entry: Any) -> list[int]:
    shape = entry.get("shape")
    if not isinstance(shape, list) or not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError(f"tensor '{name}' has an impossible shape, {shape!r}")
    return shape


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or [type(offset) for offset in offsets] != [int, int] or min(offsets) < 0:
        raise ValueError(f"tensor '{name}' has impossible offsets, {offsets!r}")
    return offsets[0], offsets[1]


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header has a key twice")
    return found
