"""The command line, ``peft-xmask``.

One file per group of commands. Nothing heavy is imported before a command needs it. An expected error ends a command
with one line on standard error and exit code 2; ``--debug`` shows where it came from.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape

from .._version import __version__
from ..errors import PeftXMaskError
from . import bank, demo, inspection, personalize, plot, pool, reference, serve, train
from .console import errors

EXPECTED = (PeftXMaskError, ValueError, OSError, ImportError, KeyError)
_COMMAND_LINE_ERROR: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(
    name="peft-xmask",
    help="Train, measure and inspect profiles of a few hundred bytes over one frozen model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("demo")(demo.demo)
app.command("personalize")(personalize.personalize)
app.command("predict")(personalize.predict)
app.command("serve")(serve.serve)
app.command("train")(train.train)
app.command("eval")(train.evaluate)
app.command("inspect")(inspection.inspect)
app.command("cards")(reference.cards)
app.command("describe")(reference.describe)
app.command("compare")(reference.compare)
app.add_typer(pool.app, name="pool")
app.add_typer(bank.app, name="bank")
app.add_typer(plot.app, name="plot")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"peft-xmask {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Version = False,
) -> None:
    """Train, measure and inspect profiles of a few hundred bytes over one frozen model."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status: 0, 1 (a check found something), 2 (error), 130 (interrupted)."""
    quieten()
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit status."""
    debug = "--debug" in arguments
    try:
        status = app(arguments, standalone_mode=False, prog_name="peft-xmask")
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted.", 130)
    except _COMMAND_LINE_ERROR as error:
        return _fail(error.format_message(), error.exit_code)
    except EXPECTED as error:
        if debug:
            raise
        return _fail(_one_line(error), 2)
    return status if isinstance(status, int) else 0


def quieten() -> None:
    """Silence the progress bars and advice of the libraries underneath; our own output says what matters."""
    import os
    import warnings

    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _one_line(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"Expected a file at '{error.filename}', found none. Check the path."
    text = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(str(text).split()) or type(error).__name__


def _fail(message: str, status: int) -> int:
    errors.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    return status
