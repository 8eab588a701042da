"""``peft-xmask cards``, ``describe`` and ``compare``: PEFT-Ref on the command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .console import output, print_facts, print_json, progress_bar

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from ..reference import Card, Comparison

TASKS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def cards(
    method: Annotated[str | None, typer.Argument(help="A PEFT method, such as LORA. Default: all.")] = None,
    as_json: Json = False,
) -> None:
    """Describe PEFT's methods: one in full, or all in a table."""
    from ..reference import card_for
    from ..reference import cards as all_cards

    chosen = all_cards() if method is None else (card_for(method),)
    if as_json:
        print_json([card_facts(card) for card in chosen])
    elif method is None:
        _print_table(chosen)
    else:
        print_facts(card_facts(chosen[0]), title=chosen[0].title)
        if chosen[0].reasons:
            output.print()
            print_facts(dict(chosen[0].reasons), title="Why")


def card_facts(card: Card) -> dict[str, str]:
    """A card as names and values."""
    return {
        "method": card.method,
        "source": card.source,
        **card.properties(),
        "trainable parameters": str(card.trainable),
        "bytes stored": str(card.stored),
        **{name: card.text(field) for name, field in _ABILITIES.items()},
        **({"needs": card.needs} if card.needs else {}),
    }


_ABILITIES = {
    "merges": "merges",
    "mixed batches": "supports_mixed_batch",
    "several adapters": "several",
    "several active": "adds_up",
}


def describe(
    adapter: Annotated[str, typer.Argument(help="Adapter folder or Hub id.")],
    base: Annotated[str | None, typer.Option(help="Base model. Default: the one the adapter names.")] = None,
    as_json: Json = False,
) -> None:
    """Describe an adapter: structure, sites, evaluated formulas and measured sizes."""
    from peft import PeftConfig, PeftModel

    from ..errors import ConfigError
    from ..reference import describe as describe_model

    config: Any = PeftConfig.from_pretrained(adapter)
    name = base or config.base_model_name_or_path
    if not name:
        raise ConfigError(f"'{adapter}' does not name its base model. Pass it with --base.")
    model = PeftModel.from_pretrained(load_model(name, config.task_type, Path(adapter)), adapter, is_trainable=True)
    facts = describe_model(model).to_dict()[0]
    if as_json:
        print_json(facts)
    else:
        print_facts({key: _text(value) for key, value in facts.items()})


def compare(
    base: Annotated[str, typer.Option(help="Base model: folder or Hub id.")],
    methods: Annotated[list[str], typer.Argument(help="PEFT methods, such as LORA, or adapter folders.")],
    task: Annotated[str, typer.Option(help=f"One of: {', '.join(TASKS)}.")] = "FEATURE_EXTRACTION",
    out: Annotated[
        list[Path] | None, typer.Option(help="File to write: .md, .csv, .html or .png. May be given again.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Rounds of timing.")] = 7,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="METHOD.FIELD=VALUE of a config, such as LORA.r=16.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure methods side by side on one base: parameters, bytes, FLOPs, time and memory."""
    from ..reference import compare as measure

    writers = [_writer(path) for path in out or ()]
    settings = _settings(setting or [])
    candidates = [candidate(method, task, settings) for method in methods]
    model = load_model(base, task)
    with progress_bar("comparing", total=len(candidates) + 1 + repeats) as report:
        result = measure(model, candidates, repeats=repeats, progress=report)
    for writer in writers:
        writer(result)
    if as_json:
        print_json(result.to_records())
    else:
        _print_comparison(result)


def load_model(name: str, task: Any, adapter: Path | None = None) -> nn.Module:
    """A base model for a task; for a folder that ``train`` wrote, with the head it was trained with.

    Raises:
        ConfigError: an unknown task.
        OSError: no such model.
    """
    import transformers

    from ..errors import ConfigError

    if adapter is not None and (adapter / "config.json").is_file():
        from .classify import TextClassifier

        inner: Any = TextClassifier.load(adapter, name).model
        unloaded: nn.Module = inner.unload()
        return unloaded
    key = str(getattr(task, "value", task) or "FEATURE_EXTRACTION")
    if key not in TASKS:
        raise ConfigError(f"task={key!r} is unknown: expected one of {', '.join(TASKS)}.")
    model: nn.Module = getattr(transformers, TASKS[key]).from_pretrained(name)
    return model


def candidate(method: str, task: str, settings: dict[str, dict[str, Any]]) -> PeftConfig | str:
    """A config of a method, or the folder of an adapter."""
    if os.path.isdir(method):
        return method
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

    from ..reference import card_for

    name = card_for(method).method
    fields = settings.get(name, {})
    config: PeftConfig = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)](task_type=task, **fields)
    return config


def _settings(given: list[str]) -> dict[str, dict[str, Any]]:
    """``METHOD.FIELD=VALUE`` as fields of configs; values are JSON where they can be read as that.

    Raises:
        ConfigError: not of that form.
    """
    import json

    from ..errors import ConfigError

    settings: dict[str, dict[str, Any]] = {}
    for text in given:
        name, equals, value = text.partition("=")
        method, dot, field = name.partition(".")
        if not equals or not dot:
            raise ConfigError(f"--set {text!r} cannot be read. Expected METHOD.FIELD=VALUE, such as LORA.r=16.")
        try:
            settings.setdefault(method.upper(), {})[field] = json.loads(value)
        except ValueError:
            settings.setdefault(method.upper(), {})[field] = value
    return settings


def _writer(path: Path) -> Any:
    """A function that writes a comparison to a file of this ending.

    Raises:
        ConfigError: an ending that is not known.
    """
    from ..core.files import write_text
    from ..errors import ConfigError

    texts = {".md": "to_markdown", ".csv": "to_csv", ".html": "to_html"}
    if path.suffix == ".png":
        return lambda result: result.plot(path)
    if path.suffix not in texts:
        raise ConfigError(f"--out {str(path)!r}: expected a name that ends in .md, .csv, .html or .png.")
    return lambda result: write_text(path, getattr(result, texts[path.suffix])())


def _text(value: Any) -> Any:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value


def _print_table(chosen: tuple[Card, ...]) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("method", "insertion", "integration", "merges", "supports_mixed_batch"):
        table.add_column(title, no_wrap=True)
    for card in chosen:
        facts = [card.text(name) for name in ("insertion_form", "integration_form", "merges", "supports_mixed_batch")]
        table.add_row(card.method, *facts)
    output.print(table)


_SIZES = ("trainable parameters", "bytes stored", "bytes of file", "FLOPs per token", "peak bytes of a step")
_TIMES = ("inference time, x base", "training step, x base", "load, ms", "switch, ms")


def _print_comparison(result: Comparison) -> None:
    """Two tables, sizes and times, so that they fit a terminal; then what could not be placed."""
    from rich.markup import escape

    from ..reference.tables import cell

    for titles in (_SIZES, _TIMES):
        table = Table(box=None, pad_edge=False)
        table.add_column("method", no_wrap=True)
        for title in titles:
            table.add_column(escape(title), justify="right")
        for record in result.to_cells():
            if record.get("why not") is None:
                table.add_row(escape(record["method"]), *(escape(cell(record.get(title))) for title in titles))
        output.print(table)
        output.print()
    for row in result.rows:
        if row.error is not None:
            output.print(escape(f"{row.name}: {row.error}"), style="yellow", soft_wrap=True)
    output.print(escape(result.note), style="dim", soft_wrap=True)
