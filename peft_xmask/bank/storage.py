"""A bank's folder: an ordinary X-PEFT adapter of P rows, and the names of the rows. See docs/bank-format.md."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import safetensors
import torch
from torch import Tensor

from ..core.adapter_folder import ADAPTER_FILE
from ..core.files import write_atomically, write_tensors, write_text
from ..core.hub import CONFIG_FILE, Folder
from ..errors import FileFormatError, LockedError
from ..tuners.base.model_card import complete_card
from ..tuners.xpeft import XPEFTConfig
from .config import config_of
from .names import NameIndex

BITS = "base_model.model.mask_table.xpeft_bits.weight"
GAIN_BITS = "base_model.model.mask_table.xpeft_gain_bits.weight"
NAMES_PATTERN = "profiles-*.safetensors"
FILENAMES = (CONFIG_FILE, ADAPTER_FILE, NAMES_PATTERN, "README.md")
LOCK_FILE = ".bank.lock"
VERSION = "1"
_NAMES_FILE = re.compile(r"profiles-[0-9a-f]{16}\.safetensors")
_VERSION_KEY, _NAMES_KEY = "bank_version", "bank_names"
_BYTES = torch.uint8
_DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
    "torch.int64": "I64",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}
_LOOKS = 20
_BLOCK = 1 << 24  # bytes that are written at once


@dataclass(frozen=True)
class Content:
    """What a bank's files hold.

    Attributes:
        bits: uint8 ``[P, 2, S, W]``.
        gain_bits: uint8 ``[P, S, 2]``, or None.
        shared: tensors of modules saved whole, such as a head, by their name in the file.
        names: of the rows; None in an ordinary adapter.
    """

    bits: Tensor
    gain_bits: Tensor | None
    shared: Mapping[str, Tensor]
    names: NameIndex | None


def read_config(folder: Folder) -> XPEFTConfig:
    """The config of a bank's folder.

    Raises:
        FileFormatError: missing, or not that of an X-PEFT adapter.
    """
    return config_of(folder.read_json(CONFIG_FILE), str(folder.path / CONFIG_FILE))


def open_bank(folder: Folder) -> Content:
    """Map a bank's files into memory. Nothing is read but their headers; pages come as they are touched.

    Raises:
        FileFormatError: a file that is missing, damaged or replaced all the time, or files that do not belong together.
    """
    for _ in range(_LOOKS):
        tensors, metadata = _mapped(folder.path / ADAPTER_FILE)
        name = _names_of(metadata)
        if name is None or (folder.path / name).exists():
            break  # else a writer replaced the bank in between, and its names are other ones
    if BITS not in tensors:
        raise FileFormatError(f"Expected '{BITS}' in '{folder.path / ADAPTER_FILE}', found {sorted(tensors)}.")
    names = None
    if name is not None:
        names = NameIndex(_mapped(folder.path / name)[0])
        if len(names) != len(tensors[BITS]):
            raise FileFormatError(
                f"Expected names for the {len(tensors[BITS])} profiles of '{folder.path}', found {len(names)}."
            )
    shared = {key: tensor for key, tensor in tensors.items() if key not in (BITS, GAIN_BITS)}
    return Content(tensors[BITS], tensors.get(GAIN_BITS), shared, names)


def write_bank(
    folder: Path,
    config: XPEFTConfig,
    names: NameIndex,
    parts: Mapping[str, tuple[tuple[int, ...], Iterable[Tensor]]],
    shared: Mapping[str, Tensor],
) -> None:
    """Write a bank. Until the file of masks is renamed over the old one, the old bank is what readers find.

    Args:
        config: with ``num_profiles`` as it is to be.
        parts: uint8 tensors of the file by name: their shapes, and their rows in blocks.
        shared: tensors saved whole.

    Raises:
        LockedError: another process is writing there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        filename = names_file(names)
        write_tensors(folder / filename, names.tensors)
        metadata = {"format": "pt", _VERSION_KEY: VERSION, _NAMES_KEY: filename}
        write_atomically(folder / ADAPTER_FILE, lambda path: _write_stream(path, parts, shared, metadata))
        with tempfile.TemporaryDirectory() as beside:
            config.save_pretrained(beside)
            write_text(folder / CONFIG_FILE, (Path(beside) / CONFIG_FILE).read_text(encoding="utf-8"))
        complete_card(folder, config)
        for stale in folder.glob(NAMES_PATTERN):
            if stale.name != filename:
                stale.unlink(missing_ok=True)


def names_file(names: NameIndex) -> str:
    """What the file of these names is called."""
    hasher = hashlib.sha256()
    for name in ("ends", "names"):
        hasher.update(names.tensors[name].contiguous().numpy().tobytes())
    return f"profiles-{hasher.hexdigest()[:16]}.safetensors"


def _names_of(metadata: Mapping[str, str]) -> str | None:
    """The file of names that a file of masks goes with; None: an ordinary adapter."""
    name = metadata.get(_NAMES_KEY)
    if name is not None and (metadata.get(_VERSION_KEY) != VERSION or not _NAMES_FILE.fullmatch(name)):
        raise FileFormatError(
            f"Expected a bank of version {VERSION} with its names in a file {NAMES_PATTERN}, found version "
            f"{metadata.get(_VERSION_KEY)!r} and {name[:80]!r}. Update peft_xmask, or fetch the bank again."
        )
    return name


def _mapped(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of one file: safetensors opens a path twice, and a writer may rename in between."""
    for _ in range(_LOOKS):
        before = _stamp(path)
        if before is None:
            raise FileFormatError(f"Expected a file '{path}', found none. Fetch or write the bank again.")
        failure = None
        try:
            with safetensors.safe_open(str(path), framework="pt") as opened:
                found = {name: opened.get_tensor(name) for name in opened.keys()}, dict(opened.metadata() or {})  # noqa: SIM118
        except (safetensors.SafetensorError, ValueError, OSError, RuntimeError) as error:
            failure = error
        if before != _stamp(path):
            continue
        if failure is None:
            return found
        raise FileFormatError(
            f"'{path}' ({before[0]} bytes) is not a readable safetensors file: {failure}. It may be truncated or "
            "damaged; fetch or write it again."
        ) from failure
    raise FileFormatError(f"'{path}' was replaced each of the {_LOOKS} times it was opened. Open it again later.")


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What tells a file from the one that replaces it, its size first; None where there is none."""
    if not path.is_file():
        return None
    found = path.stat()
    return found.st_size, found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    lock = filelock.FileLock(folder / LOCK_FILE, blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise LockedError(f"Another process is writing the bank '{folder}'. Try again when it is done.") from error
    try:
        yield
    finally:
        lock.release()


def _write_stream(
    path: Path,
    parts: Mapping[str, tuple[tuple[int, ...], Iterable[Tensor]]],
    shared: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    """A safetensors file, written from front to back: shared tensors, which may have any alignment, come first."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(shared.items())}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, tensor in ready.items():
        header[name] = _entry(_DTYPES[str(tensor.dtype)], tuple(tensor.shape), at, at := at + tensor.nbytes)
    for name, (shape, _) in parts.items():
        size = 1
        for length in shape:
            size *= length
        header[name] = _entry("U8", shape, at, at := at + size)
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in ready.values():
            stream.write(tensor.flatten().view(_BYTES).numpy().tobytes())
        for _, blocks in parts.values():
            for block in blocks:
                stream.write(block.contiguous().numpy().tobytes())


def _entry(dtype: str, shape: tuple[int, ...], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def in_blocks(tensor: Tensor, rows: Tensor | None) -> Iterator[Tensor]:
    """Rows of a tensor a few megabytes at a time; None: all of them."""
    count = len(tensor) if rows is None else len(rows)
    step = max(1, _BLOCK // max(1, tensor[:1].nbytes))
    for start in range(0, count, step):
        yield tensor[start : start + step] if rows is None else tensor.index_select(0, rows[start : start + step])
