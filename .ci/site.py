"""MkDocs hooks: README.md is the home page and CHANGELOG.md the changelog; both stay at the top level."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
SPHINX_ROLE = re.compile(r":(?:attr|class|func|meth|mod):<code>~?")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the two pages, with links relative to ``docs``."""
    for source, page in (("README.md", "index.md"), ("CHANGELOG.md", "changelog.md")):
        text = (ROOT / source).read_text(encoding="utf-8")
        text = text.replace("](docs/", "](").replace("](CHANGELOG.md)", "](changelog.md)")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Show the Sphinx roles of docstrings (``:class:`~peft.PeftModel```) as plain code."""
    return SPHINX_ROLE.sub("<code>", html)
