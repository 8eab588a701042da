"""``peft-xmask personalize`` and ``peft-xmask predict``: from a table of people to a bank, and its answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from .console import bytes_text, output, print_facts, print_json, progress_bar

if TYPE_CHECKING:
    from ..bank.bank import ProfileBank
    from ..people.predictor import Prediction
    from ..people.report import Report

Answer = Callable[[list[str], "list[str | None]"], list[dict[str, Any]]]
"""Texts and whose each is -> the objects to print."""


class Task(str, Enum):
    """What is learnt of each person."""

    classification = "classification"
    regression = "regression"
    multi_label = "multi-label"
    causal_lm = "causal-lm"


def personalize(
    base: Annotated[str, typer.Option(help="Base model: folder or Hub id.")],
    data: Annotated[str, typer.Option(help="CSV, JSON Lines or Parquet file, or a dataset: folder or Hub id.")],
    out: Annotated[Path, typer.Option(help="Folder to write the bank to.")],
    text: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    label: Annotated[
        str | None,
        typer.Option(help="Column of the labels; causal-lm: of completions. Default: label; causal-lm: none."),
    ] = None,
    who: Annotated[str, typer.Option(help="Column that says whose each row is.")] = "user",
    task: Annotated[Task, typer.Option(help="What is learnt.")] = Task.classification,
    pool: Annotated[
        str, typer.Option(help="'random', 'fit' (to these people), or a saved pool: folder or Hub id.")
    ] = "random",
    split: Annotated[str | None, typer.Option(help="Column with train, validation or test.")] = None,
    time: Annotated[str | None, typer.Option(help="Column by which a person's rows are ordered.")] = None,
    hub_split: Annotated[str, typer.Option(help="Split of a dataset.")] = "train",
    epochs: Annotated[float, typer.Option(help="Passes over the data for the masks; 0: no masks.")] = 4.0,
    max_length: Annotated[int, typer.Option(help="Tokens after which a text is cut.")] = 128,
    num_adapters: Annotated[int, typer.Option(help="Adapters in a random pool.")] = 104,
    layers: Annotated[int, typer.Option(help="How many of the last blocks are adapted; 0: all.", min=0)] = 2,
    min_labels: Annotated[int, typer.Option(help="Training rows that a person needs for a profile.", min=1)] = 3,
    common_epochs: Annotated[
        int, typer.Option(help="Passes over the data for a common adapter (causal-lm, --pool fit).", min=1)
    ] = 10,
    seed: Annotated[int, typer.Option(help="Of the masks' start, the order of the data and dropout.")] = 0,
    ray: Annotated[int | None, typer.Option(help="Train with this many Ray workers.", min=1)] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Write over a bank at --out.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Learn what all people share and a profile for each of them; write a bank and say what each part brings."""
    from ..errors import ConfigError
    from ..people.personalize import personalize as run
    from ..people.settings import PersonalizeSettings
    from ..people.table import PeopleTable

    if (out / "adapter_config.json").exists() and not replace:
        raise ConfigError(f"There is a bank at '{out}' already. Choose another folder, or pass --replace.")
    settings = PersonalizeSettings(
        epochs=epochs, max_length=max_length, num_adapters=num_adapters, layers=layers or None, min_labels=min_labels,
        common_epochs=common_epochs, seed=seed,
    )  # fmt: skip
    with progress_bar("reading the table"):
        table = PeopleTable.read(
            data, text=text, label=label, who=who, task=task.value, split=split, time=time, hub_split=hub_split
        )
    if not as_json:
        print_facts(
            {
                "people": f"{len(table.people):,} with training examples",
                "examples": ", ".join(f"{len(rows):,} {part}" for part, rows in table.parts.items()),
                "learnt": _learnt(table.task, table.labels, label),
            }
        )
    done = run(base, table, out, settings, pool=pool, ray=ray, resume=resume, progress=not as_json)
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
    max_new_tokens: Annotated[int, typer.Option(help="Language models: most tokens to add to a text.", min=1)] = 64,
    score: Annotated[bool, typer.Option("--score", help="Language models: say how likely texts are.")] = False,
) -> None:
    """Answer texts, each as its person would: JSON lines out.

    A line is a JSON object with "text" and, without --who, "who" (missing or null: nobody); or it is the text itself.
    Banks of language models continue the texts, or with --score say how likely they are.
    """
    from itertools import islice

    from ..bank.bank import ProfileBank
    from ..errors import ConfigError
    from ..people.writer import is_language_bank

    opened = ProfileBank.from_pretrained(bank)
    if who is not None and who not in opened:
        raise ConfigError(
            f"No profile {who!r} in the bank '{bank}' of {len(opened):,}. Leave --who away for the answers of the "
            "common part."
        )
    if is_language_bank(opened):
        answer = _writing(opened, base, batch_size, max_new_tokens, score)
    elif score:
        raise ConfigError("--score is for banks of language models; this bank always gives the scores of its labels.")
    else:
        answer = _predicting(opened, base, batch_size)
    lines = enumerate(_lines(source), 1)
    while some := [_request(line, number, who) for number, line in islice(lines, 8 * batch_size)]:
        for found in answer([text for text, _ in some], [name for _, name in some]):
            sys.stdout.write(json.dumps(found, ensure_ascii=False) + "\n")
        sys.stdout.flush()


def _predicting(bank: ProfileBank, base: str | None, batch_size: int) -> Answer:
    from ..people.predictor import Predictor

    predictor = Predictor(bank, base)

    def answer(texts: list[str], people: list[str | None]) -> list[dict[str, Any]]:
        found = predictor.predict(texts, people, batch_size=batch_size)
        return [to_json(text, each) for text, each in zip(texts, found, strict=True)]

    return answer


def _writing(bank: ProfileBank, base: str | None, batch_size: int, max_new_tokens: int, score: bool) -> Answer:
    from ..people.writer import Writer

    writer = Writer(bank, base)

    def write(texts: list[str], people: list[str | None]) -> list[dict[str, Any]]:
        found = writer.write(texts, people, max_new_tokens=max_new_tokens, batch_size=batch_size)
        return [
            {"text": text, "who": each.who, "continuation": each.text, "personal": each.personal}
            for text, each in zip(texts, found, strict=True)
        ]

    def likely(texts: list[str], people: list[str | None]) -> list[dict[str, Any]]:
        return [
            {
                "text": text, "who": each.who, "nats_per_token": round(each.nats_per_token, 4),
                "perplexity": round(each.perplexity, 2), "tokens": each.tokens, "personal": each.personal,
            }
            for text, each in zip(texts, writer.score(texts, people), strict=True)
        ]  # fmt: skip

    return likely if score else write


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


def _learnt(task: str, names: tuple[str, ...], label: str | None) -> str:
    if task == Task.causal_lm.value:
        return "the texts themselves" if label is None else f"completions ({label})"
    if task == Task.regression.value:
        return f"numbers ({names[0]})"
    return f"{len(names)} labels: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
