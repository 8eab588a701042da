"""``peft-xmask bank``: make, look at, check and compare banks of profiles. No model is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .bank_report import SHOWN, SIZES, describe_bank, print_difference, print_written, shown_name
from .bank_sources import chosen_names, find_adapters, folder_of, is_adapter, open_bank, read_names
from .console import bytes_text, output, print_facts, print_json, progress_bar

if TYPE_CHECKING:
    from ..profiles import LiveBank, ProfileBank

app = typer.Typer(help="Make, look at, check and compare banks of profiles.", no_args_is_help=True)

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
    if len(sources) == 1 and is_adapter(Path(sources[0])):
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
    names = ", ".join(map(shown_name, facts.pop("first_names"))) + (", ..." if facts["profiles"] > SHOWN else "")
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
    print_written(merged, out)


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
    chosen = chosen_names(wanted, names)
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
    output.print(f"{shown_name(old)} is now called {shown_name(new)}", markup=False, soft_wrap=True)


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
    print_written(frozen, out)


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
    chosen = chosen_names(wanted, names)
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
        if is_adapter(folder) and not replace:
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
        output.print(f"{shown_name(name)}: {folder}", markup=False, soft_wrap=True)
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
        print_difference(found)
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


def _refuse_present(out: Path, replace: bool) -> None:
    from ..errors import ConfigError

    if out.is_file():
        raise ConfigError(f"'{out}' is a file, and a bank is a folder. Choose another place.")
    if is_adapter(out) and not replace:
        raise ConfigError(f"'{out}' already holds a bank or an adapter. Choose another place, or pass --replace.")


def _write(bank: ProfileBank, out: Path) -> None:
    with progress_bar(f"writing {len(bank):,} profiles"):
        bank.save_pretrained(out)
    print_written(bank, out)
