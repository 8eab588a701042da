"""The figures that the documentation shows are those of the kept trainings."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DRAW = ROOT / "tests" / "benchmarks" / "quality_docs.py"


def run(*arguments):
    command = [sys.executable, str(DRAW), *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_the_tables_of_the_documentation_are_what_the_kept_lines_say(tmp_path):
    pages = [ROOT / "README.md", ROOT / "docs" / "study.md", ROOT / "docs" / "benchmarks.md"]
    told = run("--check", *pages)
    assert told.returncode == 0, told.stdout + told.stderr
    assert "study.md: 0 tables" not in told.stdout

    text = pages[1].read_text(encoding="utf-8")
    wrong = tmp_path / "study.md"
    wrong.write_text(text.replace("| head only | 0 | 0.", "| head only | 0 | 1.", 1), encoding="utf-8")
    assert run("--check", wrong).returncode == 1
    assert run(wrong).returncode == 0
    assert wrong.read_text(encoding="utf-8") == text
