"""Runs a quick part of the tests with the installed versions and enters the result in docs/works-with.md.

python tests/versions.py NAME, in the environment that is to be tested, where NAME is that of the row.
"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "works-with.md"
BEGIN, END = "<!-- versions, made by tests/versions.py -->", "<!-- end of versions -->"
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "huggingface_hub", "trl", "sentence-transformers")
TESTS = ("tests/xpeft/test_doors.py", "tests/test_peft.py", "tests/integrations/test_trainer.py")
"""The doors through which adapters are loaded, PEFT's private names, and the Trainer."""


def run(folder: Path) -> list[Path]:
    """Run each file of tests; the reports."""
    reports = []
    for number, tests in enumerate(TESTS):
        reports.append(folder / f"{number}.xml")
        report = ["-o", "junit_family=xunit1", f"--junitxml={reports[-1]}"]
        subprocess.run([sys.executable, "-m", "pytest", "-n", "0", "-q", *report, tests], cwd=ROOT, check=False)
    return reports


def count(report: Path) -> Counter[str]:
    """How many tests of a report passed, failed and were skipped."""
    found: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        found["failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"] += 1
    return found


def enter(name: str, reports: list[Path]) -> None:
    """Write the row of the page, in place of the one of that name."""
    total = sum((count(report) for report in reports), Counter())
    cells = [name, platform.python_version(), *(version(library) for library in LIBRARIES)]
    cells += [str(total[what]) for what in ("passed", "skipped", "failed")]
    line = f"| {' | '.join(cells)} |"
    text = PAGE.read_text(encoding="utf-8")
    table = re.search(f"{BEGIN}\n(.*){END}", text, flags=re.DOTALL)
    assert table is not None, f"{PAGE} has no table between {BEGIN} and {END}"
    lines = [each for each in table[1].splitlines() if not each.startswith(f"| {name} |")]
    PAGE.write_text(text.replace(table[0], "\n".join([BEGIN, *lines, line, END])), encoding="utf-8")


def main() -> int:
    """Run, enter, and fail if a test did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="of the row, such as newest")
    parser.add_argument("--reports", nargs="*", type=Path, help="reports of a run that was made before")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        reports = args.reports or run(Path(folder))
        enter(args.name, reports)
        return 1 if any(count(report)["failed"] for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
