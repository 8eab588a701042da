"""What commands about banks print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bank_sources import open_bank
from .console import bytes_text, output, print_facts

if TYPE_CHECKING:
    from ..bank.difference import Difference
    from ..profiles import ProfileBank

SHOWN = 10
SIZES = {
    "profile_bytes": "bytes a profile",
    "payload_bytes": "masks and gains",
    "names_bytes": "names",
    "head_bytes": "shared head",
    "pool_bytes": "stored pool",
    "file_bytes": "file",
    "folder_bytes": "folder",
}


def describe_bank(where: str) -> dict[str, Any]:
    """Everything that ``bank inspect`` prints, as plain data. No row is read."""
    from itertools import islice

    from ..bank.live import LiveBank, is_live_bank
    from ..bank.storage import LIVE_FILE
    from ..core.adapter_folder import ADAPTER_FILE
    from ..pool import AdapterPool

    path = Path(where)
    live = LiveBank.open(path) if is_live_bank(path) else None
    bank = live.kind if live is not None else open_bank(where)
    config, profiles, size = bank.config, live if live is not None else bank, bank.nbytes
    file = path / (ADAPTER_FILE if live is None else LIVE_FILE)
    files = [each for each in path.iterdir() if each.is_file()] if path.is_dir() else []
    return {
        "kind": "bank" if live is None else "live bank",
        "path": where,
        "version": None if live is None else live.version,
        "profiles": len(profiles),
        "first_names": list(islice(profiles, SHOWN)),
        "base_model": config.base_model_name_or_path,
        "base_fingerprint": config.base_fingerprint,
        "pool": config.pool or f"random, seed {config.pool_seed}",
        "pool_fingerprint": config.pool_fingerprint,
        "num_adapters": bank.spec.num_adapters,
        "num_sites": bank.spec.num_sites,
        "mask_type": bank.spec.mask_type,
        "top_k": bank.spec.top_k if bank.spec.mask_type == "hard" else None,
        "learn_gain": bank.spec.learn_gain,
        "sizes": {
            "profile_bytes": size,
            "payload_bytes": size * len(profiles),
            "names_bytes": None
            if live is not None
            else sum(each.nbytes for each in bank.name_index().tensors.values()),
            "head_bytes": sum(tensor.nbytes for tensor in bank.shared.values()),
            "pool_bytes": AdapterPool.from_pretrained(config.pool).nbytes if isinstance(config.pool, str) else 0,
            "file_bytes": file.stat().st_size if files else None,
            "folder_bytes": sum(each.stat().st_size for each in files) if files else None,
        },
    }


def print_written(bank: ProfileBank, out: Path) -> None:
    """What was written, and where."""
    from ..core.adapter_folder import ADAPTER_FILE

    size = (out / ADAPTER_FILE).stat().st_size
    print_facts(
        {
            "profiles": f"{len(bank):,}",
            "bytes a profile": f"{bank.nbytes:,}",
            "pool": bank.config.pool_fingerprint,
            "file": bytes_text(size),
        }
    )
    output.print(f"Bank written to {out}", markup=False, soft_wrap=True)


def print_difference(found: Difference) -> None:
    """How two banks differ, in as many lines as one reads."""
    for field, (before, after) in found.settings.items():
        output.print(f"setting {field}: {before!r} -> {after!r}", markup=False, soft_wrap=True)
    if not found.same_shared:
        output.print("the head that all profiles share is another one")
    for sign, names in (("-", found.removed), ("+", found.added)):
        for name in names[:SHOWN]:
            output.print(f"{sign} {shown_name(name)}", markup=False, soft_wrap=True)
        _print_more(len(names), "removed" if sign == "-" else "added")
    for change in found.changed[:SHOWN]:
        numbers = (("gains", change.gains), ("offsets", change.offsets))
        more = "".join(f", {count} {what}" for what, count in numbers if count)
        output.print(f"~ {shown_name(change.name)}: {change.bits:,} bits{more}", markup=False, soft_wrap=True)
    _print_more(len(found.changed), "changed")
    output.print(
        f"{len(found.added):,} added, {len(found.removed):,} removed, {len(found.changed):,} changed, "
        f"{found.unchanged:,} unchanged"
    )


def _print_more(count: int, what: str) -> None:
    if count > SHOWN:
        output.print(f"  and {count - SHOWN:,} more {what} (all of them with --json)")


def shown_name(name: str) -> str:
    """A name that moves no cursor."""
    return name if name.isprintable() else repr(name)
