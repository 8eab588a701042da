"""The list of what does not apply in PEFT's own suites: how it is applied, and that the docs have the same one."""

from pathlib import Path

import pytest
from methods import METHODS
from peft_suites import HERE, compare, read_toml, unused

PAGE = Path(__file__).resolve().parents[2] / "docs" / "conformance.md"
LISTED = {
    "fails": [
        {"methods": ["ours"], "tests": "test_merge.*", "error": "MergeError: no linear map", "reason": "not linear"}
    ],
    "skipped": [{"tests": "test_prompt.*", "says": "prompt learning", "reason": "not prompt learning"}],
}


def outcome(what: str, error: str = "", method: str = "ours", test: str = "test_merge_layers") -> dict[str, str]:
    return {"what": what, "error": error, "traceback": f"Traceback\n{error}", "method": method, "test": test}


@pytest.fixture(scope="module")
def entries() -> dict:
    return read_toml(HERE / "does_not_apply.toml")


def test_what_is_listed_and_fails_as_listed_is_excused():
    outcomes = {"one": outcome("failed", "E MergeError: no linear map"), "two": outcome("passed", test="test_forward")}
    assert compare(outcomes, LISTED, whole=True) == []


@pytest.mark.parametrize(
    "unlisted",
    [
        outcome("failed", "E AssertionError"),
        outcome("failed", "E MergeError: no linear map", method="another"),
        outcome("failed", "E MergeError: no linear map", test="test_unmerge"),
        outcome("skipped", "this test needs a GPU", test="test_prompt"),
        outcome("skipped", "Skip tests that are not prompt learning"),
    ],
    ids=["another error", "another method", "another test", "a skip for another reason", "a skip of another test"],
)
def test_what_is_not_listed_is_reported(unlisted):
    listed = outcome("failed", "E MergeError: no linear map")
    (report,) = compare({"listed": listed, "suite.py::test_x": unlisted}, LISTED, whole=True)
    assert "suite.py::test_x" in report
    assert unlisted["error"] in report


def test_a_skip_that_is_listed_is_excused():
    skip = outcome("skipped", "Skip tests that are not prompt learning", test="test_prompt_tuning")
    assert compare({"one": skip}, LISTED, whole=True) == []


def test_a_test_that_passes_although_it_is_listed_is_reported_in_a_whole_run():
    outcomes = {"one": outcome("passed")}
    assert compare(outcomes, LISTED, whole=True) == ["passes, but is listed: ours in test_merge_layers: not linear"]
    assert compare(outcomes, LISTED, whole=False) == []


def test_an_entry_about_no_test_is_reported():
    outcomes = {"one": outcome("failed", "E MergeError: no linear map")}
    assert unused(outcomes, LISTED) == ["listed, but there is no such test: test_prompt.*: not prompt learning"]


def test_the_list_is_short_and_names_methods_that_there_are(entries):
    assert len(entries["fails"]) < 12
    assert {name for entry in entries["fails"] for name in entry["methods"]} <= {method.name for method in METHODS}


def test_the_docs_have_the_same_list(entries):
    section = PAGE.read_text(encoding="utf-8").partition("### What does not apply\n")[2].partition("\n## ")[0]
    rows = [line.replace("\\|", "|") for line in section.splitlines() if line.startswith("| ")]
    fails = [
        f"| {', '.join(entry['methods'])} | `{entry['tests']}` | {entry['reason']} |" for entry in entries["fails"]
    ]
    skipped = [f"| `{entry['tests']}` | {entry['reason']} |" for entry in entries["skipped"]]
    line = "| --- | --- | --- |"
    assert rows == ["| methods | tests | reason |", line, *fails, "| tests | reason |", line[:-6], *skipped]
