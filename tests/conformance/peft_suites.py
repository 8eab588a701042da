"""Runs PEFT's own test suites over our methods: ``python tests/conformance/peft_suites.py [suite ...]``.

The suites come from the source distribution of the PEFT that is installed; nothing of them is kept. What fails or is
skipped must be listed in ``does_not_apply.toml``, with a reason. Exit code 1 for what is not listed, and for what is
listed and passes; 2 if the suites could not be run. docs/conformance.md says more.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SUITES = {
    "decoder": "test_decoder_models.py",
    "custom": "test_custom_models.py",
    "encoder-decoder": "test_encoder_decoder_models.py",
    "feature-extraction": "test_feature_extraction_models.py",
    "classifier": "test_seq_classifier.py",
}
"""The longest first: they are started in this order."""

Outcomes = dict[str, dict[str, str]]


def main() -> int:
    """Obtain the suites, run them, and compare what became of the tests with the list."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="*", help=f"of {', '.join(SUITES)}; or all, which is the default")
    parser.add_argument("--sdist", type=Path, help="PEFT's source distribution; downloaded if not given")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="suites run at once")
    parser.add_argument("-k", dest="expression", help="run only tests that match, as pytest's -k")
    args = parser.parse_args()
    if unknown := set(args.suites) - {*SUITES, "all"}:
        parser.error(f"no such suite: {', '.join(sorted(unknown))}. Expected: {', '.join(SUITES)}, or all")
    everything = not args.suites or "all" in args.suites
    suites = [suite for suite in SUITES if everything or suite in args.suites]
    entries = read_toml(HERE / "does_not_apply.toml")
    with tempfile.TemporaryDirectory() as work:
        try:
            root = unpacked(args.sdist or downloaded(Path(work)), Path(work))
        except (OSError, subprocess.CalledProcessError, tarfile.TarError, StopIteration) as error:
            print(f"PEFT's own suites were NOT RUN: no source distribution of PEFT {version('peft')} ({error!r}).")
            print("They need the package index, or a copy of it in --sdist PATH.")
            return 2
        from tiny_models import save_models

        save_models(root / "hub")
        with ThreadPoolExecutor(max(1, args.jobs)) as pool:
            results = list(pool.map(lambda suite: run(root, suite, args.expression), suites))
    outcomes = {test: outcome for result in results if result for test, outcome in result.items()}
    bad = compare(outcomes, entries, whole=not args.expression)
    if everything and not args.expression:
        bad += unused(outcomes, entries)
    counts = Counter(outcome["what"] for outcome in outcomes.values())
    print(*bad, f"PEFT {version('peft')}: {dict(sorted(counts.items()))}", sep="\n")
    if None in results or not outcomes:
        print("A suite could not be run: PEFT's tables may have changed their names; see peft_plugin.py.")
        return 2
    print("Not all is as listed." if bad else "What failed or was skipped is listed, with its reason.")
    return 1 if bad else 0


def downloaded(folder: Path) -> Path:
    """PEFT's source distribution, from the package index."""
    wanted = ["--no-deps", "--no-binary", ":all:", "--dest", str(folder), f"peft=={version('peft')}"]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *wanted], check=True)
    return next(folder.glob("peft-*.tar.gz"))


def unpacked(sdist: Path, folder: Path) -> Path:
    """The root of the unpacked distribution, its tests alone, as a package."""
    with tarfile.open(sdist) as archive:
        for member in archive:
            content = archive.extractfile(member) if re.fullmatch(r"[^/.]+[^/]*/tests/[^/]+\.py", member.name) else None
            if content is not None:
                (folder / member.name).parent.mkdir(parents=True, exist_ok=True)
                (folder / member.name).write_bytes(content.read())
    root = next(folder.glob("peft-*/tests")).parent
    (root / "tests" / "__init__.py").touch()
    return root


def run(root: Path, suite: str, expression: str | None) -> Outcomes | None:
    """What became of each test of a suite; None, and pytest's own words, if it could not be run."""
    written = root / f"{suite}.json"
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(root / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PEFT_SUITES_OUTCOMES": str(written),
        "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "peft_plugin", "-p", "no:cacheprovider"]
    command += ["--disable-warnings", "--rootdir", str(root), *(["-k", expression] if expression else [])]
    started = time.monotonic()
    done = subprocess.run(
        [*command, f"tests/{SUITES[suite]}"], cwd=root, env=environment, check=False, capture_output=True, text=True
    )
    nothing_chosen = done.returncode == 5 and expression is not None
    if done.returncode not in (0, 1) and not nothing_chosen:
        print(f"{suite}: pytest ended with {done.returncode}", done.stdout[-5000:], done.stderr[-5000:], sep="\n")
        return None
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    print(f"{suite}: {last} ({time.monotonic() - started:.0f} s in all)", flush=True)
    return json.loads(written.read_text(encoding="utf-8"))


def compare(outcomes: Outcomes, entries: dict[str, list[dict[str, Any]]], *, whole: bool) -> list[str]:
    """What is not as the list says: failures and skips that are not in it, and entries under which a test passes.

    An entry names ``tests``, a regular expression for a test's whole name. Under ``fails`` it also names ``methods``,
    and has ``error``, to be found in the last entry of the traceback; under ``skipped`` it has ``says``, to be found in
    the words of the skip.

    If ``whole``, each of the methods must fail in each of the tests at least once, where it is run at all.
    """
    bad = []
    failing, run_by = set(), {}
    for name, outcome in outcomes.items():
        pair = outcome["method"], outcome["test"]
        listed = [entry for entry in entries["fails"] if concerns(entry, *pair)]
        if outcome["what"] == "failed":
            if any(re.search(entry["error"], outcome["error"]) for entry in listed):
                failing.add(pair)
            else:
                bad.append(f"failed: {name}\n{outcome['traceback'][-3000:]}")
        elif outcome["what"] == "skipped":
            if not any(is_skipped(entry, outcome["test"], outcome["error"]) for entry in entries["skipped"]):
                bad.append(f"skipped: {name}: {outcome['error']}")
            continue
        if listed:
            run_by[pair] = listed[0]["reason"]
    if whole:
        bad += [f"passes, but is listed: {m} in {t}: {why}" for (m, t), why in run_by.items() if (m, t) not in failing]
    return bad


def unused(outcomes: Outcomes, entries: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Entries about tests that were not there, after a run of everything."""
    pairs = {(outcome["method"], outcome["test"]) for outcome in outcomes.values()}
    lost = [e for e in entries["fails"] if not any(concerns(e, *pair) for pair in pairs)]
    skips = [(outcome["test"], outcome["error"]) for outcome in outcomes.values() if outcome["what"] == "skipped"]
    lost += [e for e in entries["skipped"] if not any(is_skipped(e, *skip) for skip in skips)]
    return [f"listed, but there is no such test: {entry['tests']}: {entry['reason']}" for entry in lost]


def concerns(entry: dict[str, Any], method: str, test: str) -> bool:
    """Whether an entry under ``fails`` is about a method in a test."""
    return method in entry["methods"] and re.fullmatch(entry["tests"], test) is not None


def is_skipped(entry: dict[str, Any], test: str, words: str) -> bool:
    """Whether an entry under ``skipped`` is about a skip."""
    return re.fullmatch(entry["tests"], test) is not None and re.search(entry["says"], words) is not None


def read_toml(path: Path) -> dict[str, list[dict[str, Any]]]:
    """A TOML file's content; Python 3.10 needs ``tomli`` for it."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
