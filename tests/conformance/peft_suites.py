"""Runs PEFT's own test suites over our methods: ``python tests/conformance/peft_suites.py [suite ...]``.

The suites come from the source distribution of the PEFT that is installed; nothing of them is kept. A test that fails
must be listed in ``does_not_apply.toml`` with its error and a reason. Exit code 1 for a failure that is not listed, and
for an entry under which nothing fails any more.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import peft

HERE = Path(__file__).resolve().parent
SUITES = {
    "custom": "test_custom_models.py",
    "decoder": "test_decoder_models.py",
    "encoder-decoder": "test_encoder_decoder_models.py",
    "feature-extraction": "test_feature_extraction_models.py",
    "classifier": "test_seq_classifier.py",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="*", help=f"of {', '.join(SUITES)}; all if none is named")
    parser.add_argument("--sdist", type=Path, help="PEFT's source distribution; downloaded if not given")
    parser.add_argument("-k", dest="expression", help="run only tests that match, as pytest's -k")
    args = parser.parse_args()
    if unknown := set(args.suites) - set(SUITES):
        parser.error(f"no such suite: {', '.join(sorted(unknown))}. Expected: {', '.join(SUITES)}")
    with tempfile.TemporaryDirectory() as work:
        root = unpacked(args.sdist or downloaded(Path(work)), Path(work))
        from tiny_models import save_models

        save_models(root)
        outcomes = run(root, args.suites or list(SUITES), args.expression)
    print("PEFT", peft.__version__, dict(sorted(Counter(what for what, _ in outcomes.values()).items())))
    if not outcomes:
        print("No test was run: PEFT's tables may have changed their names; see peft_plugin.py.")
        return 1
    return compare(outcomes, whole=not args.suites and not args.expression)


def downloaded(folder: Path) -> Path:
    """PEFT's source distribution, from the package index."""
    wanted = ["--no-deps", "--no-binary", ":all:", "--dest", str(folder), f"peft=={peft.__version__}"]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *wanted], check=True)
    return next(folder.glob("peft-*.tar.gz"))


def unpacked(sdist: Path, folder: Path) -> Path:
    """The root of the unpacked distribution, its tests alone, as a package."""
    with tarfile.open(sdist) as archive:
        members = [member for member in archive if re.fullmatch(r"[^/]+/tests/[^/]+\.py", member.name)]
        archive.extractall(folder, members=members, filter="data")
    root = next(folder.glob("peft-*/tests")).parent
    (root / "tests" / "__init__.py").touch()
    return root


def run(root: Path, suites: list[str], expression: str | None) -> dict[str, tuple[str, str]]:
    """What became of each test and the error of a failure, by test id."""
    outcomes = root / "outcomes.json"
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PEFT_SUITES_OUTCOMES": str(outcomes),
        "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "peft_plugin", "-p", "no:cacheprovider"]
    command += ["--disable-warnings", "--rootdir", str(root), *(["-k", expression] if expression else [])]
    subprocess.run([*command, *(f"tests/{SUITES[suite]}" for suite in suites)], cwd=root, env=environment, check=False)
    return json.loads(outcomes.read_text(encoding="utf-8")) if outcomes.exists() else {}


def compare(outcomes: dict[str, tuple[str, str]], *, whole: bool) -> int:
    """Exit code: 1 for a failure that is not listed, or, after a whole run, for an entry that excuses nothing."""
    entries = read_toml(HERE / "does_not_apply.toml")["case"]
    failed = {name: error for name, (what, error) in outcomes.items() if what == "failed"}
    excused = [
        {n for n, error in failed.items() if re.search(entry["test"], n) and re.search(entry["error"], error)}
        for entry in entries
    ]
    bad = [f"failed: {name}" for name in failed if not any(name in names for names in excused)]
    if whole:
        bad += [f"nothing fails under: {e['test']}" for e, names in zip(entries, excused, strict=True) if not names]
    print("\n".join(bad) or f"Each of the {len(failed)} failures is listed as not applying, with its reason.")
    return 1 if bad else 0


def read_toml(path: Path) -> dict[str, list[dict[str, str]]]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
