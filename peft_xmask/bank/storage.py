"""A bank's folder: one file that is the whole bank, and what PEFT wants beside it. See docs/bank-format.md.

Replacing that one file is the only moment at which a bank changes. A reader opens it once and has one whole bank, and
keeps it however often it is replaced, because the system keeps a file for as long as someone has it open.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
from torch import Tensor

from ..core.adapter_folder import ADAPTER_FILE, NAMES_PREFIX
from ..core.files import write_atomically, write_text
from ..core.hub import CONFIG_FILE, Folder
from ..core.tensor_file import MappedTensors, header_sha256, map_tensors, write_tensor_stream
from ..errors import FileFormatError, LockedError
from ..pool.beside import PATTERN as POOL_PATTERN
from ..pool.beside import carried, located
from ..tuners.base.classifier import CONFIG_FILE as MODEL_CONFIG
from ..tuners.base.model_card import complete_card
from ..tuners.xpeft import XPEFTConfig, keys
from ..tuners.xpeft.keys import file_key
from .config import config_of, fields_of
from .names import TENSORS, NameIndex

BITS, GAIN_BITS, OFFSET_BITS = (file_key(part) for part in (keys.BITS, keys.GAIN_BITS, "xpeft_offset_bits"))
ROWS = (BITS, GAIN_BITS, OFFSET_BITS)
"""Tensors with a row for each profile, by their names in a file."""

NAMES_PATTERN = "profiles-*.safetensors"
FILENAMES = (CONFIG_FILE, ADAPTER_FILE, NAMES_PATTERN, MODEL_CONFIG, POOL_PATTERN, "README.md")
LOCK_FILE = ".bank.lock"
LIVE_FILE = "live_bank.sqlite"
VERSION = "2"
VERSION_KEY, CONFIG_KEY, DATA_KEY, HEADER_KEY = "bank_version", "bank_config", "bank_data_sha256", "bank_header_sha256"
_NAMES_KEY = "bank_names"  # of version 1
_NAMES_FILE = re.compile(r"profiles-[0-9a-f]{16}\.safetensors")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_BLOCK = 1 << 24  # bytes that are read or written at once


@dataclass(frozen=True)
class Content:
    """What a bank's files hold.

    Attributes:
        bits: uint8 ``[P, 2, S, W]``.
        gain_bits: uint8 ``[P, S, 2]``, or None.
        shared: tensors of modules saved whole, such as a head, by their name in the file.
        names: of the rows; None in an ordinary adapter.
        offset_bits: uint8 ``[P, 2 * C]``, half-precision numbers added to C outputs; None where there are none.
    """

    bits: Tensor
    gain_bits: Tensor | None
    shared: Mapping[str, Tensor]
    names: NameIndex | None
    offset_bits: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Those with a row for each profile, in the order of :data:`ROWS`."""
        return self.bits, self.gain_bits, self.offset_bits

    @property
    def rows(self) -> dict[str, Tensor]:
        """Those of :attr:`tensors` that are there, by their names in a file."""
        return {key: tensor for key, tensor in zip(ROWS, self.tensors, strict=True) if tensor is not None}


@dataclass(frozen=True)
class StoredBank:
    """An open bank, or an ordinary X-PEFT adapter.

    Attributes:
        config: of its profiles; ``num_profiles`` is the number of rows.
        content: mapped into memory.
        version: of the format; None: an ordinary adapter.
        file: the main file.
    """

    config: XPEFTConfig
    content: Content
    version: str | None
    file: MappedTensors

    @property
    def data_digest(self) -> str | None:
        """What the SHA-256 of the file's tensors should be; None where nothing is written of it."""
        return self.file.metadata.get(DATA_KEY)


def open_bank(folder: Folder) -> StoredBank:
    """Map a bank into memory. Only the header is read; pages come as they are touched.

    Raises:
        FileFormatError: a file is missing or damaged, or is of another method or a later version.
    """
    path = folder.path / ADAPTER_FILE
    if not path.exists() and (folder.path / LIVE_FILE).exists():
        raise FileFormatError(
            f"'{folder.path}' holds a live bank. Open it with LiveBank.open, or freeze it into another folder: "
            "`peft-xmask bank freeze`."
        )
    file = map_tensors(path)
    version = file.metadata.get(VERSION_KEY)
    if not any(key.startswith("bank_") for key in file.metadata):
        return _stored(folder, file, _config_beside(folder), None, None)
    if version == "1":
        names = NameIndex(_names_of_version_1(folder, file.metadata))
        return _stored(folder, file, _config_beside(folder), names, version)
    if version != VERSION:
        raise FileFormatError(
            f"Expected a bank of version 1 or {VERSION} in '{path}', found version {version!r:.80}. Update peft_xmask, "
            "or fetch the bank again."
        )
    _check_header(file, path)
    names = NameIndex(
        {name: file.tensors[NAMES_PREFIX + name] for name in TENSORS if NAMES_PREFIX + name in file.tensors}
    )
    return _stored(folder, file, config_of(_json(file.metadata.get(CONFIG_KEY), path), str(path)), names, version)


def write_bank(
    folder: Path,
    config: XPEFTConfig,
    names: NameIndex,
    rows: Mapping[str, tuple[tuple[int, ...], Iterable[Tensor]]],
    shared: Mapping[str, Tensor],
) -> None:
    """Write a bank. Until its file is renamed over the old one, the old bank is what readers find.

    Args:
        config: with ``num_profiles`` as it is to be.
        rows: uint8 tensors by their names in the file: their shapes, and their rows in blocks.
        shared: tensors saved whole.

    Raises:
        LockedError: another process is writing there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        fields = {**fields_of(config), "pool": carried(fields_of(config)["pool"], folder)}
        metadata = {"format": "pt", VERSION_KEY: VERSION, CONFIG_KEY: json.dumps(fields, sort_keys=True)}
        fixed = {**shared, **{NAMES_PREFIX + name: tensor for name, tensor in names.tensors.items()}}
        write_atomically(
            folder / ADAPTER_FILE,
            lambda path: write_tensor_stream(path, fixed, rows, metadata, DATA_KEY, HEADER_KEY),
        )
        write_text(folder / CONFIG_FILE, json.dumps(fields, indent=2, sort_keys=True))
        complete_card(folder, config)
        for stale in folder.glob(NAMES_PATTERN):  # a bank of version 1 was here
            stale.unlink(missing_ok=True)


def in_blocks(tensor: Tensor, rows: Tensor | None) -> Iterator[Tensor]:
    """Rows of a tensor a few megabytes at a time; None: all of them."""
    count = len(tensor) if rows is None else len(rows)
    step = max(1, _BLOCK // max(1, tensor[:1].nbytes))
    for start in range(0, count, step):
        yield tensor[start : start + step] if rows is None else tensor.index_select(0, rows[start : start + step])


def _stored(
    folder: Folder, file: MappedTensors, config: XPEFTConfig, names: NameIndex | None, version: str | None
) -> StoredBank:
    tensors = file.tensors
    where = folder.path / ADAPTER_FILE
    if BITS not in tensors or tensors[BITS].dim() != 4:
        raise FileFormatError(f"Expected '{BITS}' of shape [P, 2, S, W] in '{where}', found {sorted(tensors)}.")
    bits, gain_bits, offset_bits = (tensors.get(key) for key in ROWS)
    assert bits is not None
    if names is not None and len(names) != len(bits):
        raise FileFormatError(f"Expected names for the {len(bits)} profiles of '{where}', found {len(names)}.")
    config.num_profiles, config.pool = len(bits), located(config.pool, folder.path)
    shared = {key: tensor for key, tensor in tensors.items() if key not in ROWS and not key.startswith(NAMES_PREFIX)}
    return StoredBank(config, Content(bits, gain_bits, shared, names, offset_bits), version, file)


def _config_beside(folder: Folder) -> XPEFTConfig:
    return config_of(folder.read_json(CONFIG_FILE), str(folder.path / CONFIG_FILE))


def _check_header(file: MappedTensors, path: Path) -> None:
    """Refuse a header that is not the one that was written, before anything in it is believed."""
    said = file.metadata.get(HEADER_KEY, "")
    found = header_sha256(file.header, HEADER_KEY, said)
    if said != found or not _DIGEST.fullmatch(file.metadata.get(DATA_KEY, "")):
        raise FileFormatError(
            f"Expected a header of SHA-256 {said[:64]!r} in '{path}', found one of {found!r}. The file is damaged or "
            "was edited; fetch or write the bank again."
        )


def _json(text: str | None, path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(text or "")
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"Expected the config of a bank in the header of '{path}', found {error}.") from error
    if not isinstance(fields, dict):
        raise FileFormatError(f"Expected a JSON object as config in the header of '{path}', found {fields!r:.80}.")
    return fields


def _names_of_version_1(folder: Folder, metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """A bank of version 1 had its names in a file of their own."""
    name = metadata.get(_NAMES_KEY, "")
    if not _NAMES_FILE.fullmatch(name):
        raise FileFormatError(
            f"Expected the names of a bank of version 1 in a file {NAMES_PATTERN}, found {name[:80]!r}. Fetch the bank "
            "again."
        )
    return map_tensors(folder.path / name).tensors


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
