"""Every Python block of the README and the docs runs, as it stands, one page after another, offline."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
MODEL = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def hub_cache(minilm, tmp_path_factory) -> Path:
    """A Hub cache that holds the real MiniLM under its Hub id, as if it had been fetched before."""
    home = tmp_path_factory.mktemp("hf-home")
    repo = home / "hub" / f"models--{MODEL.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    commit = "0" * 40
    (repo / "refs" / "main").write_text(commit)
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for path in minilm.iterdir():
        (snapshot / path.name).symlink_to(path)
    return home


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_examples_of_a_page_run(page: Path, hub_cache: Path, tmp_path: Path):
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    if not blocks:
        pytest.skip("this page has no Python examples")
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    env = {**os.environ, "HF_HOME": str(hub_cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    if "The version of PEFT you are using is not compatible" in done.stderr:
        pytest.skip("this page uses transformers' own adapter methods, which refuse the installed PEFT")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_printed_as_documented(blocks, done.stdout)


def assert_printed_as_documented(blocks: list[str], stdout: str) -> None:
    """A comment line after a ``print(...)`` line quotes its output; numbers may differ a little between machines."""
    quoted = [line for block in blocks for line in re.findall(r"^print\(.*\)\n# (.*)$", block, re.MULTILINE)]
    printed = iter(stdout.splitlines())
    for expected in quoted:
        shape = NUMBER.sub("0", expected)
        found = next((line for line in printed if NUMBER.sub("0", line) == shape), None)
        assert found is not None, f"not printed: {expected}"
        for one, other in zip(NUMBER.findall(found), NUMBER.findall(expected), strict=True):
            assert float(one) == pytest.approx(float(other), abs=0.1), f"printed {found}, documented {expected}"


def test_the_api_page_has_every_public_name():
    import peft_xmask
    from peft_xmask import errors

    listed = set(
        re.findall(r"^::: peft_xmask\.(?:profiles\.)?(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    )
    assert {name for name in peft_xmask.__all__ if not name.startswith("__") and not hasattr(errors, name)} <= listed
