"""Enters the result of the tests, with the installed versions, in docs/works-with.md.

python tests/versions.py NAME REPORT, in the environment that was tested: NAME is that of the row, REPORT the file that
``pytest --junitxml`` wrote. ``ROW=NAME .ci/run`` does so.
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "works-with.md"
BEGIN, END = "<!-- versions, made by tests/versions.py -->", "<!-- end of versions -->"
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "huggingface_hub", "trl", "sentence-transformers")


def count(report: Path) -> Counter[str]:
    """How many tests of a report passed, failed and were skipped."""
    found: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        found["failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"] += 1
    return found


def enter(name: str, total: Counter[str]) -> None:
    """Write the row of the page, in place of the one of that name."""
    cells = [name, platform.python_version(), *(version(library) for library in LIBRARIES)]
    cells += [str(total[what]) for what in ("passed", "skipped", "failed")]
    line = f"| {' | '.join(cells)} |"
    text = PAGE.read_text(encoding="utf-8")
    table = re.search(f"{BEGIN}\n(.*){END}", text, flags=re.DOTALL)
    assert table is not None, f"{PAGE} has no table between {BEGIN} and {END}"
    lines = [each for each in table[1].splitlines() if not each.startswith(f"| {name} |")]
    PAGE.write_text(text.replace(table[0], "\n".join([BEGIN, *lines, line, END])), encoding="utf-8")


def main() -> int:
    """Enter the row, and fail if a test did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="of the row, such as newest")
    parser.add_argument("report", type=Path)
    args = parser.parse_args()
    total = count(args.report)
    enter(args.name, total)
    return 1 if total["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
