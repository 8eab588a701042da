"""Verification of a bank: checksums, and every row and name, in bulk."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from numpy.typing import NDArray
from peft import get_peft_model
from torch import Tensor, nn

from ..core.adapter_folder import ADAPTER_FILE
from ..core.hub import CONFIG_FILE, Folder, HubOptions, find_folder
from ..errors import ConfigError, FileFormatError, PeftXMaskError
from ..pool.beside import located
from ..tuners.base.model_card import AUTO_CLASSES
from ..tuners.xpeft import XPEFTConfig
from ..tuners.xpeft.spec import MaskSpec
from .bank import ProfileBank
from .config import config_of, fields_of
from .live import LiveBank, is_live_bank
from .names import BASE, MAX_BYTES, NameIndex, hash_of
from .similar import differing_bits
from .storage import FILENAMES, VERSION, StoredBank, in_blocks, open_bank

SHOWN = 20
"""How many problems to describe. All of them are counted."""


@dataclass(frozen=True)
class Problem:
    """One problem of a bank.

    Attributes:
        text: what was expected and what was found.
        row: the row it is in; None: it concerns the bank as a whole.
        name: of the profile, if it is readable.
    """

    text: str
    row: int | None = None
    name: str | None = None

    def __str__(self) -> str:
        if self.row is None:
            return self.text
        return f"row {self.row} ({'no readable name' if self.name is None else repr(self.name)}): {self.text}"


@dataclass(frozen=True)
class Verification:
    """The result of :func:`verify_bank`.

    Attributes:
        profiles: number of profiles checked; None if the bank cannot be opened.
        total: number of problems.
        problems: the first :data:`SHOWN` problems.
    """

    profiles: int | None
    total: int
    problems: tuple[Problem, ...]


def verify_bank(
    where: str | os.PathLike[str], *, deep: bool = False, base: str | os.PathLike[str] | nn.Module | None = None
) -> Verification:
    """Check a bank's files as docs/bank-format.md says: checksums, masks, gains, offsets, names and the shared head.

    Args:
        where: folder or Hub repository of a bank, or the folder of a live one.
        deep: load the pool and the base too, and compare their fingerprints with those in the bank.
        base: to compare with, a model or where one is found; None: the one that the bank's config names.

    Raises:
        ConfigError: there is no such folder or repository.
    """
    if is_live_bank(where):
        return _verify_live(Path(where))
    folder = find_folder(where, FILENAMES, HubOptions())
    try:
        stored = open_bank(folder)
        bank = ProfileBank.from_pretrained(folder.path)
    except FileFormatError as error:
        return Verification(None, 1, (Problem(str(error)),))
    checks = [folder_problems(folder, stored), bank_problems(bank)]
    if deep:
        checks.append(belonging_problems(bank, base))
    problems = chain.from_iterable(checks)
    first = tuple(islice(problems, SHOWN))
    return Verification(len(bank), len(first) + sum(1 for _ in problems), first)


def _verify_live(folder: Path) -> Verification:
    try:
        live = LiveBank.open(folder)
    except FileFormatError as error:
        return Verification(None, 1, (Problem(str(error)),))
    found, count = [], None
    try:
        found += [Problem(text if name is None else f"{name!r}: {text}", name=name) for name, text in live.problems()]
        count = len(live)
    except FileFormatError as error:
        found.append(Problem(str(error)))
    live.close()
    return Verification(count, len(found), tuple(found[:SHOWN]))


def _current_names(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a config file by the names that this version gives them; as they are if they make no config."""
    try:
        config = config_of(fields, CONFIG_FILE)
    except FileFormatError:
        return fields
    return {**json.loads(json.dumps(fields_of(config))), "num_profiles": fields.get("num_profiles")}


def folder_problems(folder: Folder, stored: StoredBank) -> Iterator[Problem]:
    """Bytes that changed since the bank was written, and a config for PEFT that does not match it."""
    if stored.data_digest is not None and (found := stored.file.data_sha256()) != stored.data_digest:
        yield Problem(
            f"Expected tensors of SHA-256 {stored.data_digest} in {ADAPTER_FILE}, found {found}. Bytes changed since "
            "the bank was written; fetch it again, or restore it from a copy."
        )
    try:
        beside = folder.read_json(CONFIG_FILE)
    except FileFormatError as error:
        yield Problem(f"{error} PEFT cannot load the folder.")
        return
    if stored.version == VERSION:
        expected = json.loads(json.dumps(fields_of(stored.config)))
        beside = _current_names(beside)
        beside["pool"] = located(beside.get("pool"), folder.path)
        wrong = sorted(name for name in expected if beside.get(name) != expected[name])
    else:
        expected, wrong = {"num_profiles": len(stored.content.bits)}, []
        if beside.get("num_profiles") != len(stored.content.bits):
            wrong = ["num_profiles"]
    for name in wrong:
        yield Problem(
            f"Expected {name}={expected[name]!r} in {CONFIG_FILE}, as the bank says, found {beside.get(name)!r}. PEFT "
            "reads that file; save the bank again."
        )


def belonging_problems(bank: ProfileBank, base: str | os.PathLike[str] | nn.Module | None) -> Iterator[Problem]:
    """Load the pool and the base, and compare them with those that the profiles were trained on."""
    config = copy.copy(bank.config)
    config.num_profiles, config.inference_mode = 1, True
    try:
        pool = config.resolve_pool()
        if pool.fingerprint != config.pool_fingerprint:
            yield Problem(
                f"Expected a pool with fingerprint {config.pool_fingerprint}, found {pool!r} with {pool.fingerprint}."
            )
            return
        model = base if isinstance(base, nn.Module) else _load_base(config, base)
        get_peft_model(model, config).unload()  # type: ignore[operator]
    except (PeftXMaskError, OSError, ValueError) as error:
        yield Problem(str(error))


def _load_base(config: XPEFTConfig, where: str | os.PathLike[str] | None) -> nn.Module:
    name = where or config.base_model_name_or_path
    if not name:
        raise ConfigError("The bank does not name its base. Say which model it is: base=..., or --base.")
    loader = getattr(
        transformers, AUTO_CLASSES.get(str(getattr(config.task_type, "value", config.task_type)), "AutoModel")
    )
    found: nn.Module = loader.from_pretrained(os.fspath(name))
    return found


def bank_problems(bank: ProfileBank) -> Iterator[Problem]:
    """Problems of the rows and names of a bank, and of the head that its profiles share."""
    for name, tensor in bank.shared.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            yield Problem(f"Expected finite numbers in the shared tensor '{name}', found NaN or infinity.")
    content = bank.content()
    assert content.names is not None
    rows = (
        mask_problems(bank.spec, content.bits),
        number_problems("gain at site", content.gain_bits),
        number_problems("offset of output", content.offset_bits),
        name_problems(content.names),
    )
    for row, text in chain.from_iterable(rows):
        yield Problem(text, row, None if row is None else _readable(content.names, row))


def mask_problems(spec: MaskSpec, bits: Tensor) -> Iterator[tuple[int | None, str]]:
    """Rows with invalid masks, and what is wrong with each.

    Shapes: ``bits [P, 2, S, W]``.
    """
    row = 0
    for block in in_blocks(bits, None):
        masks = np.ascontiguousarray(block.flatten(1, 2).numpy())
        wrong = _wrong_hard(masks, spec) if spec.mask_type == "hard" else np.asarray(_infinite(masks).any(-1))
        for where in np.flatnonzero(wrong.any(-1)).tolist():
            side, site = divmod(int(np.flatnonzero(wrong[where])[0]), spec.num_sites)
            said = "finite logits, found NaN or infinity"
            if spec.mask_type == "hard":
                ones = int(np.bitwise_count(masks[where, side * spec.num_sites + site]).sum())
                said = f"exactly top_k={spec.top_k} ones in its {spec.num_adapters} bits, found {ones}"
                said += f" in {masks.shape[-1]} bytes" if ones == spec.top_k else ""
            which = f"the {('down', 'up')[side]}-mask of site {site}"
            yield row + where, f"expected {which} with {said} ({int(wrong[where].sum())} masks of this row are wrong)"
        row += len(block)


def number_problems(what: str, halves: Tensor | None) -> Iterator[tuple[int | None, str]]:
    """Rows of half-precision numbers, bytes ``[P, ...]``, that are not all finite."""
    row = 0
    for block in () if halves is None else in_blocks(halves, None):
        wrong = _infinite(np.ascontiguousarray(block.flatten(1).numpy()))
        for where in np.flatnonzero(wrong.any(-1)).tolist():
            place = int(np.flatnonzero(wrong[where])[0])
            yield row + where, f"expected a finite {what} {place}, found NaN or infinity"
        row += len(block)


def name_problems(index: NameIndex) -> Iterator[tuple[int | None, str]]:
    """Rows with invalid names, and errors in the index that finds names."""
    tensors = {name: tensor.numpy() for name, tensor in index.tensors.items()}
    ends, rows, hashes = tensors["ends"], tensors["rows"], tensors["hashes"]
    encoded = []
    for row, (start, end) in enumerate(pairwise(chain([0], ends.tolist()))):
        encoded.append(tensors["names"][max(start, 0) : max(end, 0)].tobytes())
        if not 0 <= start < end <= len(tensors["names"]):
            yield row, f"expected a name, found the bytes {start} to {end} of {len(tensors['names'])}"
        elif (text := _not_a_name(encoded[-1])) is not None:
            yield row, text
    if not np.array_equal(np.sort(rows), np.arange(len(index))):
        yield None, "Expected every row once in the order of the hashes, found some missing. Write the names again."
        return
    if not (hashes[:-1] <= hashes[1:]).all() or np.any((rows[:-1] >= rows[1:]) & (hashes[:-1] == hashes[1:])):
        yield None, "Expected the hashes of names in ascending order, equal ones by row. Write the names again."
    said = np.empty_like(hashes)
    said[rows] = hashes
    true = np.fromiter((hash_of(name) for name in encoded), dtype=np.int64, count=len(encoded))
    for row in np.flatnonzero(said != true).tolist():
        yield row, f"expected the hash {true[row]} of its name, found {said[row]}: the name would not be found"
    yield from _twins(encoded, true)


def _twins(encoded: list[bytes], hashes: NDArray[np.int64]) -> Iterator[tuple[int, str]]:
    order = np.argsort(hashes, kind="stable")
    alike = np.flatnonzero(hashes[order][:-1] == hashes[order][1:])
    first: dict[bytes, int] = {}
    for row in sorted({int(order[place + step]) for place in alike.tolist() for step in (0, 1)}):
        if first.setdefault(encoded[row], row) != row:
            yield row, f"expected each name once, found it in row {first[encoded[row]]} too"


def _not_a_name(encoded: bytes) -> str | None:
    if len(encoded) > MAX_BYTES:
        return f"expected a name of at most {MAX_BYTES} bytes, found one of {len(encoded)}"
    try:
        name = encoded.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"expected its name in UTF-8, found other bytes: {error}"
    return f"expected the name of a profile, found {BASE!r}, which means none" if name == BASE else None


def _wrong_hard(masks: NDArray[np.uint8], spec: MaskSpec) -> NDArray[Any]:
    """Masks with the wrong number of ones, or ones beyond the last adapter. ``[rows, M, W]`` -> ``[rows, M]``."""
    rows, count, width = masks.shape
    ones = differing_bits(masks.reshape(-1, width), np.zeros(width, dtype=np.uint8)).reshape(rows, count)
    unused = 8 * width - spec.num_adapters
    padding = masks[..., -1] >> (8 - unused) if unused else np.zeros((rows, count), dtype=np.uint8)
    return np.asarray((ones != spec.top_k) | (padding != 0))


def _infinite(halves: NDArray[np.uint8]) -> NDArray[Any]:
    """Whether half-precision numbers are NaN or infinity. ``[..., 2 * M]`` bytes -> ``[..., M]``."""
    return np.asarray((halves.view("<u2") & 0x7C00) == 0x7C00)


def _readable(index: NameIndex, row: int) -> str | None:
    try:
        return index.name(row)
    except FileFormatError:
        return None
