"""``peft-xmask personalize`` and ``peft-xmask predict``: from a table of people to a bank, and its answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from .console import bytes_text, output, print_facts, print_json, progress_bar

if TYPE_CHECKING:
    from ..people.predictor import Prediction
    from ..people.report import Report


class Task(str, Enum):
    """What is learnt of each person."""

    classification = "classification"
    regression = "regression"
    multi_label = "multi-label"


def personalize(
    base: Annotated[str, typer.Option(help="Base model: folder or Hub id.")],
    data: Annotated[str, typer.Option(help="CSV, JSON Lines or Parquet file, or a Hub dataset.")],
    out: Annotated[Path, typer.Option(help="Folder to write the bank to.")],
    text: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    label: Annotated[str, typer.Option(help="Column of the labels.")] = "label",
    who: Annotated[str, typer.Option(help="Column that says whose each row is.")] = "user",
    task: Annotated[Task, typer.Option(help="What is learnt.")] = Task.classification,
    pool: Annotated[str, typer.Option(help="'random', or a saved pool: folder or Hub id.")] = "random",
    split: Annotated[str | None, typer.Option(help="Column with train, validation or test.")] = None,
    time: Annotated[str | None, typer.Option(help="Column by which a person's rows are ordered.")] = None,
    hub_split: Annotated[str, typer.Option(help="Split of a Hub dataset.")] = "train",
    epochs: Annotated[float, typer.Option(help="Passes over the data for the profiles.")] = 10.0,
    max_length: Annotated[int, typer.Option(help="Tokens after which a text is cut.")] = 128,
    num_adapters: Annotated[int, typer.Option(help="Adapters in a random pool.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the head, the order of the data and dropout.")] = 0,
    replace: Annotated[bool, typer.Option("--replace", help="Write over a bank at --out.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Learn what all people share and a profile for each of them; write a bank and say what each part brings."""
    from ..errors import ConfigError
    from ..people.personalize import PersonalizeSettings
    from ..people.personalize import personalize as run
    from ..people.table import PeopleTable

    if (out / "adapter_config.json").exists() and not replace:
        raise ConfigError(f"There is a bank at '{out}' already. Choose another folder, or pass --replace.")
    settings = PersonalizeSettings(epochs=epochs, max_length=max_length, num_adapters=num_adapters, seed=seed)
    with progress_bar("reading the table"):
        table = PeopleTable.read(
            data, text=text, label=label, who=who, task=task.value, split=split, time=time, hub_split=hub_split
        )
    if not as_json:
        print_facts(
            {
                "people": f"{len(table.people):,} with training examples",
                "examples": ", ".join(f"{len(rows):,} {part}" for part, rows in table.parts.items()),
                "labels": _labels(table.labels) if task is not Task.regression else f"numbers ({label})",
            }
        )
    done = run(base, table, out, settings, pool=pool, resume=resume, progress=not as_json)
    if as_json:
        print_json({**done.report.to_dict(), "bank": str(out)})
        return
    print_report(done.report)
    output.print(f"Bank of {len(done.bank):,} profiles written to {out}", markup=False, soft_wrap=True)


def predict(
    bank: Annotated[str, typer.Option(help="Bank: folder or Hub id.")],
    source: Annotated[str, typer.Argument(metavar="FILE", help="JSON Lines or lines of text; -: standard input.")],
    who: Annotated[str | None, typer.Option(help="Answer every text as this person would.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model. Default: the one the bank names.")] = None,
    batch_size: Annotated[int, typer.Option(help="Texts in a forward pass.", min=1)] = 32,
) -> None:
    """Answer texts, each as its person would: JSON lines out.

    A line is a JSON object with "text" and, without --who, "who" (missing or null: nobody); or it is the text itself.
    """
    from itertools import islice

    from ..errors import ConfigError
    from ..people.predictor import Predictor

    predictor = Predictor.from_pretrained(bank, base)
    if who is not None and who not in predictor.bank:
        raise ConfigError(
            f"No profile {who!r} in the bank '{bank}' of {len(predictor.bank):,}. Leave --who away for the answers of "
            "the common part."
        )
    lines = enumerate(_lines(source), 1)
    while some := [_request(line, number, who) for number, line in islice(lines, 8 * batch_size)]:
        answers = predictor.predict([text for text, _ in some], [name for _, name in some], batch_size=batch_size)
        for (text, _), answer in zip(some, answers, strict=True):
            sys.stdout.write(json.dumps(to_json(text, answer), ensure_ascii=False) + "\n")
        sys.stdout.flush()


def to_json(text: str, answer: Prediction) -> dict[str, Any]:
    """An answer as a JSON line has it."""
    scores = {name: round(score, 6) for name, score in answer.scores.items()}
    return {"text": text, "who": answer.who, "label": answer.label, "scores": scores, "personal": answer.personal}


def print_report(report: Report) -> None:
    """The table of what each layer brings."""
    few = f"at most {report.few_labels} labels"
    table = Table(title=f"{report.measure} on test examples", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("model")
    for name in ("all people", few, f"more than {report.few_labels}", "bytes a person"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in report.layers:
        cells = ["-" if value is None else f"{value:.3f}" for value in (layer.overall, layer.few, layer.many)]
        table.add_row(layer.name, *cells, f"{layer.nbytes:,}")
    output.print(table)
    print_facts(
        {
            "people": f"{report.people:,}, of whom {report.served_by_common:,} are served by the common part alone",
            "bank": bytes_text(report.bank_bytes),
            "time": f"{report.seconds:.0f} s, {3600 * report.people / max(report.seconds, 1e-9):,.0f} people an hour",
        }
    )


def _lines(source: str) -> Iterator[str]:
    from ..errors import FileFormatError

    if source == "-":
        yield from sys.stdin
        return
    path = Path(source)
    if not path.is_file():
        raise FileFormatError(f"Expected a file of texts at '{path}', found none. Check the path; -: standard input.")
    with path.open(encoding="utf-8") as stream:
        yield from stream


def _request(line: str, number: int, who: str | None) -> tuple[str, str | None]:
    """The text of a line, and whose it is."""
    from ..errors import FileFormatError

    line = line.rstrip("\n")
    if not line.lstrip().startswith("{"):
        return line, who
    try:
        found = json.loads(line)
    except ValueError as error:
        raise FileFormatError(f"Line {number} cannot be read as JSON: {error}.") from error
    text, name = found.get("text"), who if who is not None else found.get("who")
    name = str(name) if isinstance(name, int) and not isinstance(name, bool) else name
    if not isinstance(text, str) or not (name is None or isinstance(name, str)):
        raise FileFormatError(
            f'Expected {{"text": "...", "who": "..."}} in line {number}, found {line[:60]!r}. "who" may be missing.'
        )
    return text, name


def _labels(names: tuple[str, ...]) -> str:
    return f"{len(names)}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
