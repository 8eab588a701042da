"""``peft-xmask bank``: make, look at, check and compare banks of profiles. No model is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import bytes_text, output, print_facts, print_json, progress_bar

if TYPE_CHECKING:
    from ..bank.difference import Difference
    from ..profiles import LiveBank, ProfileBank

app = typer.Typer(help="Make, look at, check and compare banks of profiles.", no_args_is_help=True)

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
Bank = Annotated[str, typer.Argument(help="Folder or Hub id of a bank.")]
Place = Annotated[Path, typer.Argument(help="Folder of a bank, which is changed.")]
Out = Annotated[Path, typer.Option(help="Folder to write the bank to.")]
Replace = Annotated[bool, typer.Option("--replace", help="Write over what is at --out; its readers go on undisturbed.")]
Names = Annotated[Path | None, typer.Option(help="File of names: one a line, or a JSON list.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def build(
    sources: Annotated[
        list[str], typer.Argument(help="NAME=FOLDER, adapter folders, folders of them, or one adapter of P rows.")
    ],
    out: Out,
    names: Names = None,
    replace: Replace = False,
) -> None:
    """Create a bank from adapters that were trained one by one, or from one with many rows."""
    from ..errors import ConfigError
    from ..profiles import ProfileBank

    _refuse_present(out, replace)
    if len(sources) == 1 and _is_adapter(Path(sources[0])):
        bank = ProfileBank.from_pretrained(sources[0])
        if names is not None:
            content = bank.content()
            bank = ProfileBank(bank.config, content.bits, content.gain_bits, read_names(names), content.shared)
        elif len(bank) == 1:
            bank = ProfileBank.from_profiles({Path(sources[0]).resolve().name: sources[0]})
    elif names is not None:
        raise ConfigError("--names is for one adapter of many rows. Name adapter folders as NAME=FOLDER.")
    else:
        found = find_adapters(sources)
        with progress_bar(f"reading {len(found)} adapters"):
            bank = ProfileBank.from_profiles(found)
    _write(bank, out)


@app.command()
def inspect(bank: Bank, as_json: Json = False) -> None:
    """Describe a bank, frozen or live: sizes, fingerprints, number of profiles, first names."""
    facts = describe_bank(bank)
    if as_json:
        print_json(facts)
        return
    sizes = {SIZES.get(name, name): bytes_text(size) for name, size in facts.pop("sizes").items()}
    names = ", ".join(map(_shown, facts.pop("first_names"))) + (", ..." if facts["profiles"] > SHOWN else "")
    print_facts({**facts, "profiles": f"{facts['profiles']:,}", "first names": names, **sizes})


@app.command()
def merge(
    banks: Annotated[list[str], typer.Argument(help="Folders or Hub ids of banks.")],
    out: Out,
    prefer: Annotated[
        str | None, typer.Option(help="Whose profile is kept where several banks have a name: first or last.")
    ] = None,
    replace: Replace = False,
) -> None:
    """Write several banks as one, streaming. With one bank: copy it."""
    from ..profiles import ProfileBank

    _refuse_present(out, replace)
    opened = [open_bank(bank) for bank in banks]
    with progress_bar(f"merging {len(opened)} banks"):
        merged = ProfileBank.merge(opened, out, prefer=prefer)
    _print_written(merged, out)


@app.command()
def add(
    bank: Place,
    sources: Annotated[list[str], typer.Argument(help="NAME=FOLDER, adapter folders, or folders of them.")],
    replace: Annotated[bool, typer.Option("--replace", help="Replace profiles that the bank has already.")] = False,
) -> None:
    """Put adapters that were trained one by one into a bank, frozen or live."""
    from ..errors import ConfigError

    found = find_adapters(sources)
    with _edited(bank) as edited:
        twins = [name for name in found if name in edited]
        if twins and not replace:
            raise ConfigError(f"The bank '{bank}' has a profile {twins[0]!r} already. Rename one, or pass --replace.")
        for name, folder in found.items():
            edited.add(name, folder)
    output.print(f"{len(found):,} profiles put into {bank}", markup=False, soft_wrap=True)


@app.command()
def remove(
    bank: Place,
    wanted: Annotated[list[str] | None, typer.Argument(help="Names of profiles.")] = None,
    names: Names = None,
) -> None:
    """Remove profiles from a bank, frozen or live."""
    chosen = _chosen(wanted, names)
    with _edited(bank) as edited:
        for name in chosen:
            edited.remove(name)
    output.print(f"{len(chosen):,} profiles removed from {bank}", markup=False, soft_wrap=True)


@app.command()
def rename(
    bank: Place,
    old: Annotated[str, typer.Argument(help="Name of a profile.")],
    new: Annotated[str, typer.Argument(help="The name it is to have.")],
) -> None:
    """Rename a profile of a bank, frozen or live."""
    with _edited(bank) as edited:
        edited.rename(old, new)
    output.print(f"{_shown(old)} is now called {_shown(new)}", markup=False, soft_wrap=True)


@app.command()
def freeze(
    live: Annotated[Path, typer.Argument(help="Folder of a live bank.")], out: Out, replace: Replace = False
) -> None:
    """Write a live bank as an immutable one, which can be shipped and loads with PEFT. The live bank stays in use."""
    from ..profiles import LiveBank

    _refuse_present(out, replace)
    opened = LiveBank.open(live)
    with progress_bar(f"freezing {len(opened):,} profiles"):
        frozen = opened.freeze(out)
    _print_written(frozen, out)


@app.command()
def thaw(bank: Bank, out: Annotated[Path, typer.Option(help="Folder to make the live bank in.")]) -> None:
    """Create a live bank from an immutable one, so that profiles can be added and deleted while it is served."""
    from ..profiles import LiveBank

    opened = open_bank(bank)
    with progress_bar(f"thawing {len(opened):,} profiles"):
        live = LiveBank.create(out, opened)
    output.print(f"Live bank of {len(live):,} profiles written to {out}", markup=False, soft_wrap=True)


@app.command()
def select(
    bank: Bank,
    out: Out,
    wanted: Annotated[list[str] | None, typer.Argument(help="Names of profiles.")] = None,
    names: Names = None,
    replace: Replace = False,
) -> None:
    """Write some of a bank's profiles as a new bank, in the given order."""
    chosen = _chosen(wanted, names)
    _refuse_present(out, replace)
    _write(open_bank(bank).select(chosen), out)


@app.command()
def export(
    bank: Bank,
    out: Annotated[Path, typer.Option(help="Folder to write the LoRAs to, each in a folder of its own.")],
    wanted: Annotated[list[str] | None, typer.Argument(help="Names of profiles.")] = None,
    names: Names = None,
    base: Annotated[str | None, typer.Option(help="Folder or Hub id of the base; default: the bank's.")] = None,
    vllm: Annotated[
        bool, typer.Option("--vllm", help="Refuse what vLLM refuses; fill up to one of its ranks.")
    ] = False,
    check_base: Annotated[
        bool, typer.Option(help="Read the base's weights to check that it is the one the profiles were trained on.")
    ] = True,
    replace: Annotated[bool, typer.Option("--replace", help="Write over LoRAs that are there.")] = False,
) -> None:
    """Write profiles as standard LoRA folders, which PEFT, vLLM and diffusers load. No model is loaded."""
    from ..bank.bake import LoraBaker
    from ..errors import ConfigError
    from ..integrations.vllm.ranks import fitting_rank

    chosen = [*(wanted or ()), *(() if names is None else read_names(names))]
    if not chosen:
        raise ConfigError("Expected names of profiles after the bank or in --names, found none.")
    opened = open_bank(bank)
    folders = {name: out / folder_of(name) for name in chosen}
    for name, folder in folders.items():
        if name not in opened:
            raise ConfigError(f"There is no profile {name!r} in the bank '{bank}'.")
        if _is_adapter(folder) and not replace:
            raise ConfigError(f"There is an adapter in '{folder}' already. Choose another --out, or pass --replace.")
    baker = LoraBaker(opened, base, check_base=check_base)
    if vllm and baker.has_bias:
        raise ConfigError(
            "These profiles have biases as LoRAs, which vLLM refuses. Train them with insertion_form='parallel' over a "
            "pool without biases, or export them without --vllm for other programs."
        )
    if vllm and opened.shared:
        raise ConfigError(f"This bank has a head of its own ({', '.join(sorted(opened.shared))}), which vLLM refuses.")
    rank = fitting_rank(baker.rank) if vllm else baker.rank
    size = 0
    with progress_bar(f"writing {len(chosen):,} LoRAs"):
        for name, folder in folders.items():
            lora = baker.bake(opened[name], rank)
            lora.save_pretrained(folder)
            size = lora.nbytes
    print_facts({"LoRAs": f"{len(folders):,}", "rank": f"{rank}", "tensors of each": bytes_text(size)})
    for name, folder in list(folders.items())[:SHOWN]:
        output.print(f"{_shown(name)}: {folder}", markup=False, soft_wrap=True)
    if len(folders) > SHOWN:
        output.print(f"and {len(folders) - SHOWN:,} more in {out}", markup=False, soft_wrap=True)


@app.command()
def verify(
    bank: Bank,
    deep: Annotated[bool, typer.Option("--deep", help="Load the pool and the base, and compare fingerprints.")] = False,
    base: Annotated[
        str | None, typer.Option(help="With --deep: folder or Hub id of the base; default: the bank's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a bank, frozen or live: checksums, every mask, gain, offset and name. Exit code 1 if something is wrong."""
    from ..errors import ConfigError
    from ..profiles import verify_bank

    if base is not None and not deep:
        raise ConfigError("--base is for --deep, which compares the base's fingerprint with the bank's.")
    with progress_bar(f"checking {bank}"):
        found = verify_bank(bank, deep=deep, base=base)
    if as_json:
        problems = [{"row": each.row, "name": each.name, "problem": each.text} for each in found.problems]
        print_json({"profiles": found.profiles, "sound": not found.total, "total": found.total, "problems": problems})
    else:
        for problem in found.problems:
            output.print(str(problem), markup=False, soft_wrap=True)
        if found.total > len(found.problems):
            output.print(f"and {found.total - len(found.problems):,} more")
        checked = "It cannot be opened." if found.profiles is None else f"{found.profiles:,} profiles checked"
        output.print(f"{checked}{f', {found.total:,} problems.' if found.profiles is not None else ''}")
    if found.total:
        raise typer.Exit(1)


@app.command()
def diff(
    old: Annotated[str, typer.Argument(help="Bank, as it was.")],
    new: Annotated[str, typer.Argument(help="Bank, as it is now.")],
    as_json: Json = False,
) -> None:
    """List profiles that were added, removed or changed, and the changed bits. Exit code 1 if there are any."""
    from ..profiles import compare_banks

    with progress_bar("comparing two banks"):
        found = compare_banks(open_bank(old), open_bank(new))
    if as_json:
        changed = [change._asdict() for change in found.changed]
        settings = {name: list(values) for name, values in found.settings.items()}
        print_json(
            {
                "added": list(found.added), "removed": list(found.removed), "changed": changed,
                "unchanged": found.unchanged, "settings": settings, "same_head": found.same_shared,
            }
        )  # fmt: skip
    else:
        _print_difference(found)
    if found:
        raise typer.Exit(1)


class _LiveEdits:
    """A live bank with the methods by which commands edit a bank."""

    def __init__(self, live: LiveBank) -> None:
        self.live = live

    def __contains__(self, name: object) -> bool:
        return name in self.live

    def add(self, name: str, folder: str) -> None:
        bank = self.live.kind.select([])
        bank.add(name, folder)
        self.live.put(name, bank[name])

    def remove(self, name: str) -> None:
        self.live.delete(name)

    def rename(self, old: str, new: str) -> None:
        self.live.rename(old, new)


@contextmanager
def _edited(place: Path) -> Iterator[ProfileBank | _LiveEdits]:
    """A bank to edit. A frozen one is written when the block ends without an error; a live one at each edit."""
    from ..bank.live import LiveBank, is_live_bank
    from ..errors import ConfigError

    if is_live_bank(place):
        yield _LiveEdits(LiveBank.open(place))
        return
    if not place.is_dir():
        raise ConfigError(f"Expected the folder of a bank, found none at '{place}'. Banks of the Hub are not changed.")
    bank = open_bank(str(place))
    yield bank
    with progress_bar(f"writing {len(bank):,} profiles"):
        bank.save_pretrained(place)


def _chosen(wanted: list[str] | None, names: Path | None) -> list[str]:
    from ..errors import ConfigError

    chosen = [*(wanted or ()), *(() if names is None else read_names(names))]
    if not chosen:
        raise ConfigError("Expected names of profiles after the bank or in --names, found none.")
    return chosen


def open_bank(where: str) -> ProfileBank:
    """A bank in a folder or on the Hub.

    Raises:
        ConfigError, FileFormatError: there is none, or it is damaged.
    """
    from ..profiles import ProfileBank

    return ProfileBank.from_pretrained(where)


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


def find_adapters(sources: list[str]) -> dict[str, str]:
    """Adapter folders by the names for their profiles.

    Raises:
        ConfigError: a folder without adapters, or a name twice.
    """
    from ..errors import ConfigError

    found: dict[str, str] = {}
    for source in sources:
        name, equals, folder = source.partition("=")
        if equals and not Path(source).exists():
            some = {name: Path(folder)}
        elif _is_adapter(Path(source)):
            some = {Path(source).resolve().name: Path(source)}
        else:
            some = {each.parent.name: each.parent for each in sorted(Path(source).glob("*/adapter_config.json"))}
        if not some:
            raise ConfigError(
                f"Expected NAME=FOLDER, an adapter's folder or a folder of such folders, found '{source}'."
            )
        if twice := sorted(set(some) & set(found)):
            raise ConfigError(f"Two adapters are called {twice[0]!r}. Name one of them otherwise, as NAME=FOLDER.")
        found |= {name: str(folder) for name, folder in some.items()}
    return found


def folder_of(name: str) -> str:
    """The name of a profile as that of a folder: percent-encoded, and shortened with a digest if it is long."""
    import hashlib
    from urllib.parse import quote

    quoted = quote(name, safe=" @+,=") if name.strip(".") else name.replace(".", "%2E")
    if len(quoted) <= 200:
        return quoted
    return f"{quoted[:160]}~{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def read_names(path: Path) -> list[str]:
    """Names in a file: one a line, or a JSON list if it ends with ``.json``.

    Raises:
        FileFormatError: not UTF-8, or not a list of strings.
    """
    from ..errors import FileFormatError

    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else [line for line in text.split("\n") if line]
    except ValueError as error:
        raise FileFormatError(f"Expected names in '{path}', in UTF-8, found other content: {error}.") from error
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise FileFormatError(f"Expected a JSON list of names in '{path}', found something else.")
    return found


def _is_adapter(path: Path) -> bool:
    return (path / "adapter_config.json").is_file()


def _refuse_present(out: Path, replace: bool) -> None:
    from ..errors import ConfigError

    if out.is_file():
        raise ConfigError(f"'{out}' is a file, and a bank is a folder. Choose another place.")
    if _is_adapter(out) and not replace:
        raise ConfigError(f"'{out}' already holds a bank or an adapter. Choose another place, or pass --replace.")


def _write(bank: ProfileBank, out: Path) -> None:
    with progress_bar(f"writing {len(bank):,} profiles"):
        bank.save_pretrained(out)
    _print_written(bank, out)


def _print_written(bank: ProfileBank, out: Path) -> None:
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


def _print_difference(found: Difference) -> None:
    for field, (before, after) in found.settings.items():
        output.print(f"setting {field}: {before!r} -> {after!r}", markup=False, soft_wrap=True)
    if not found.same_shared:
        output.print("the head that all profiles share is another one")
    for sign, names in (("-", found.removed), ("+", found.added)):
        for name in names[:SHOWN]:
            output.print(f"{sign} {_shown(name)}", markup=False, soft_wrap=True)
        _print_more(len(names), "removed" if sign == "-" else "added")
    for change in found.changed[:SHOWN]:
        numbers = (("gains", change.gains), ("offsets", change.offsets))
        more = "".join(f", {count} {what}" for what, count in numbers if count)
        output.print(f"~ {_shown(change.name)}: {change.bits:,} bits{more}", markup=False, soft_wrap=True)
    _print_more(len(found.changed), "changed")
    output.print(
        f"{len(found.added):,} added, {len(found.removed):,} removed, {len(found.changed):,} changed, "
        f"{found.unchanged:,} unchanged"
    )


def _print_more(count: int, what: str) -> None:
    if count > SHOWN:
        output.print(f"  and {count - SHOWN:,} more {what} (all of them with --json)")


def _shown(name: str) -> str:
    """A name that moves no cursor."""
    return name if name.isprintable() else repr(name)
