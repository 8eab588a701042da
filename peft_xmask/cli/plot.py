"""``peft-xmask plot``: pictures of a bank. Needs matplotlib."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated, Any

import typer

from .bank import Bank
from .bank_sources import open_bank
from .console import output, progress_bar

app = typer.Typer(
    help="Draw a bank of profiles: masks, a map of profiles, use of the pool, bytes.", no_args_is_help=True
)

Out = Annotated[Path, typer.Option(help="Picture to write: .png, .svg, .pdf or whatever else matplotlib knows.")]


@app.command()
def masks(
    bank: Bank,
    out: Out,
    profile: Annotated[
        list[str] | None, typer.Option(help="Name of a profile. May be given again. Default: the mean of all.")
    ] = None,
) -> None:
    """Draw which adapters of the pool are selected at each site."""
    from ..bank.plot import plot_masks

    _save(plot_masks(_opened(bank), profile or ()), out)


@app.command(name="map")
def map_profiles(
    bank: Bank,
    out: Out,
    values: Annotated[
        Path | None, typer.Option(help="CSV file with a header; its first column has the names of profiles.")
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column that colours the points. Default: the second.")] = None,
    limit: Annotated[int, typer.Option(help="Draw at most so many profiles, chosen at random.", min=3)] = 2000,
    name: Annotated[
        list[str] | None, typer.Option(help="Profile to mark and name on the map. May be given again.")
    ] = None,
) -> None:
    """Draw profiles in two dimensions, with similar masks close to each other.

    An --out that ends in .html is a page that names each point when it is pointed at, and finds people by name.
    """
    from ..bank.map_page import map_page
    from ..bank.plot import plot_map
    from ..core.files import write_text

    title, found = (column or "", None) if values is None else read_column(values, column)
    opened, wanted = _opened(bank), name or ()
    if out.suffix == ".html":
        write_text(out, map_page(opened, found, column=title, limit=limit, names=wanted))
        output.print(f"Page written to {out}", markup=False, soft_wrap=True)
        return
    _save(plot_map(opened, found, column=title, limit=limit, names=wanted), out)


@app.command()
def usage(bank: Bank, out: Out) -> None:
    """Draw how often the adapters of the pool are selected, compared with chance."""
    from ..bank.plot import plot_usage

    _save(plot_usage(_opened(bank)), out)


@app.command(name="bytes")
def bytes_per_profile(
    bank: Bank,
    out: Out,
    base: Annotated[str | None, typer.Option(help="Base model, on which METHODs are made to be measured.")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Peer: a PEFT method, such as LORA, or an adapter folder. May be given again."),
    ] = None,
    task: Annotated[str, typer.Option(help="Task of the base model.")] = "FEATURE_EXTRACTION",
) -> None:
    """Draw bytes per profile beside those of other methods, as saved."""
    from ..bank.plot import plot_bytes

    opened = _opened(bank)
    ours = {"this bank": float(opened.nbytes)}
    peers = {name: peer_size(name, base, task) for name in method or ()}
    _save(plot_bytes({**ours, **{Path(name).name: size for name, size in peers.items()}}, tuple(ours)), out)


def peer_size(method: str, base: str | None, task: str) -> float:
    """Bytes a profile of a saved adapter, or of a method with its default config on a base, without its head.

    Raises:
        ConfigError: an unknown method, or no base for it.
    """
    from peft import PeftConfig, get_peft_model

    from ..errors import ConfigError
    from ..tuners.base.profile_size import profile_size
    from .reference import candidate, load_model

    if Path(method).is_dir():
        size = profile_size(method)
    else:
        config = candidate(method, task, {})
        if base is None or not isinstance(config, PeftConfig):
            raise ConfigError(f"Expected the folder of an adapter, or --base for the method {method!r}; found neither.")
        model: Any = load_model(base, task)
        try:
            size = profile_size(get_peft_model(model, config))
        except Exception as error:  # each method of PEFT refuses in its own way
            raise ConfigError(
                f"{method} cannot be made on '{base}': {error}. Leave it out, or give a folder."
            ) from error
    return size.payload_bytes / size.num_profiles


def read_column(path: Path, column: str | None) -> tuple[str, dict[str, str]]:
    """A column's name, and its values by the names in the first column.

    Raises:
        FileFormatError: no such column, or a file that is no CSV in UTF-8.
    """
    from ..errors import FileFormatError

    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = [row for row in csv.reader(stream) if row]
    except (ValueError, csv.Error) as error:
        raise FileFormatError(f"Expected a CSV file in UTF-8 at '{path}', found something else: {error}.") from error
    header = rows[0] if rows else []
    name = column or (header[1] if len(header) > 1 else "")
    if name not in header[1:]:
        raise FileFormatError(f"Expected a column {name!r} after the names in '{path}', found the columns {header}.")
    at = header.index(name, 1)
    return name, {row[0]: row[at] for row in rows[1:] if len(row) > at}


def _opened(where: str) -> Any:
    from ..errors import ConfigError

    opened = open_bank(where)
    if not len(opened):
        raise ConfigError(f"Expected a bank with profiles at '{where}', found an empty one.")
    return opened


def _save(figure: Any, out: Path) -> None:
    with progress_bar(f"writing {out}"):
        figure.savefig(out, dpi=150)
    output.print(f"Picture written to {out}", markup=False, soft_wrap=True)
