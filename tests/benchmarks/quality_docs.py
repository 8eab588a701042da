"""Draws the tables of the documentation from the stored results of the benchmarks quality, people and grpo.

A table follows a comment that names its script and rows: ``<!-- quality.py --tasks TASK ... --methods METHOD ... -->``,
with ``--losses`` to include losses; ``<!-- people.py --set SET --rows ROW ... -->``, with ``--measure 1`` for accuracy
and ``--adds`` for what each row adds to the layers below it; or ``<!-- grpo.py REWARD -->``. ``--check`` writes nothing
and exits with status 1 if a table differs from the results.
"""

import argparse
import re
import shlex
import sys
from pathlib import Path

import grpo_report
import people_report
from quality_choice import wanted
from quality_report import markdown

TABLE = re.compile(r"<!-- (?P<script>quality|people|grpo)\.py (?P<said>[^>]*?) -->\n\n(?P<table>(?:\|.*\n)*)")


def drawn(script, said):
    """The table that a comment asks for."""
    return {"people": drawn_people, "quality": drawn_quality, "grpo": grpo_report.markdown}[script](said) + "\n"


def drawn_people(said):
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--set", required=True, choices=people_report.MEASURES)
    parser.add_argument("--rows", nargs="+", required=True)
    parser.add_argument("--measure", type=int, default=0)
    parser.add_argument("--adds", action="store_true")
    asked = parser.parse_args(shlex.split(said))
    return people_report.markdown(asked.set, asked.rows, asked.measure, asked.adds)


def drawn_quality(said):
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--losses", action="store_true")
    asked = parser.parse_args(shlex.split(said))
    methods = {task: wanted(task, asked.methods) for task in asked.tasks}
    return markdown(asked.tasks, methods, 3, asked.losses)


def redraw(text):
    """The text with its tables drawn anew."""

    def again(found):
        gap = "" if found["table"] else "\n"  # where there was no table yet, what follows is a line away
        script, said = found["script"], found["said"]
        return f"<!-- {script}.py {said} -->\n\n{drawn(script, said)}{gap}"

    return TABLE.sub(again, text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table is not what the lines say")
    options = parser.parse_args()
    stale = 0
    for page in options.pages:
        text = page.read_text(encoding="utf-8")
        again = redraw(text)
        stale += again != text
        state = "as the lines say" if again == text else "not as the lines say"
        print(f"{page}: {len(TABLE.findall(text))} tables, {state}")
        if not options.check:
            page.write_text(again, encoding="utf-8")
    sys.exit(1 if options.check and stale else 0)


if __name__ == "__main__":
    main()
