"""Write files so that an interrupted write leaves the old file intact, and read tensors without trusting them."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigError, FileFormatError
from .tensor_file import map_tensors

try:
    import fcntl
except ImportError:  # Windows: leftovers of killed writers stay there
    fcntl = None  # type: ignore[assignment]

_SUFFIX = ".tmp"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` with a temporary path, flush what it wrote to disk, then rename it over ``path``.

    The temporary path lies in a folder beside ``path``. Folders of the same kind that killed writers left are removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _working_folder(path.parent, path.name) as working:
        beside = working / path.name
        write(beside)
        _finish(beside)
        beside.replace(path)
    _sync_folder(path.parent)


@contextmanager
def write_folder(folder: Path, last: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary folder to write into; its files are moved into ``folder`` when the block ends without an error.

    Nothing in ``folder`` changes before that. Then each file is renamed into place, so a reader finds the old file or
    the new one, always complete. Other files in ``folder`` stay. Leftovers of killed writers are removed.

    Args:
        folder: created if it does not exist.
        last: names of files that are moved after all others, in this order.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _working_folder(folder, "saving") as working:
            yield working
            written = [path for path in working.rglob("*") if path.is_file()]
            written.sort(key=lambda path: last.index(path.name) if path.name in last else -1)
            for path in written:
                _finish(path)
            for path in written:
                place = folder / path.relative_to(working)
                place.parent.mkdir(parents=True, exist_ok=True)
                path.replace(place)
    except BaseException:
        if made:
            with suppress(OSError):
                folder.rmdir()
        raise
    for parent in {(folder / path.relative_to(working)).parent for path in written}:
        _sync_folder(parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda beside: _write_text(beside, text))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically. Tensors are made contiguous; the format marker ``pt`` is always set.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    ready = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    notes = {"format": "pt", **(metadata or {})}
    write_atomically(path, lambda beside: _save(ready, beside, notes))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors and its metadata.

    Raises:
        FileFormatError: missing, truncated, oversized or otherwise not a safetensors file.
    """
    found = map_tensors(path)
    return {name: tensor.clone() for name, tensor in found.tensors.items()}, found.metadata


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    hasher = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def dtype_from_name(name: str) -> torch.dtype:
    """``"float32"``, ``"bfloat16"`` or ``"float16"`` as a torch dtype.

    Raises:
        FileFormatError: any other name.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise FileFormatError(f"Expected a storage dtype among {sorted(known)}, found {name!r}.")
    return known[name]


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, str(path), metadata=metadata)
    except safetensors.SafetensorError as error:  # its text only repeats the system's
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


@contextmanager
def _working_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new hidden folder, removed at the end. Its writer keeps it locked, so leftovers can be recognised."""
    _remove_leftovers(parent, name)
    folder, lock = _locked_folder(parent, name)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked_folder(parent: Path, name: str) -> tuple[Path, int | None]:
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=f".{name}.", suffix=_SUFFIX))
        if fcntl is None:
            return folder, None
        with suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():  # otherwise another writer removed it as a leftover before it was locked
                return folder, lock
            os.close(lock)


def _remove_leftovers(parent: Path, name: str) -> None:
    """Remove the working folders of killed writers, which nobody has locked."""
    if fcntl is None:
        return
    for leftover in parent.glob(f".{glob.escape(name)}.*{_SUFFIX}"):
        with suppress(OSError):
            lock = os.open(leftover, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(lock)


def _finish(path: Path) -> None:
    """Flush a file to disk and give it the permissions of a new file."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    path.chmod(0o666 & ~_umask())


def _sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def require_storage_dtype(dtype: object) -> torch.dtype:
    """Check that pools can be stored in a dtype.

    Raises:
        ConfigError: the dtype is not float32, bfloat16 or float16.
    """
    if not isinstance(dtype, torch.dtype) or dtype not in STORAGE_DTYPES:
        raise ConfigError(f"dtype={dtype!r} is invalid: expected torch.float32, torch.bfloat16 or torch.float16.")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` as ``"float32"``."""
    return str(dtype).removeprefix("torch.")
