"""Which versions of vLLM the plugin was tested with."""

from __future__ import annotations

import re

TESTED = ((0, 32),)
"""Major and minor version numbers whose internals the memory mode was tested with."""


def was_tested(version: str) -> bool:
    """Whether the memory mode was tested with a version of vLLM."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) in TESTED


def mode_for(wanted: str, version: str) -> str:
    """``"memory"`` or ``"folder"``: what was asked for; of ``"auto"``, memory where the version was tested."""
    if wanted == "auto":
        return "memory" if was_tested(version) else "folder"
    return wanted
