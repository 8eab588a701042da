"""Checkpoints of a run: which ones are finished, and which run wrote them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.files import read_tensors
from ..errors import ConfigError

STATE_FILE = "profiles_training_state.safetensors"
"""Written last of a checkpoint's files: a checkpoint without it is not finished and is ignored."""


def last_checkpoint(folder: Path, run: str, *, resume: bool) -> Path | None:
    """The checkpoint from which a run continues; None: it starts anew.

    Args:
        folder: with the checkpoints.
        run: identity of the run, as JSON.
        resume: whether to continue. If not, checkpoints of the same run may stay: it will write the same ones again.

    Raises:
        ConfigError: the last finished checkpoint was written by another run.
    """
    for path in _newest_first(folder):
        if not (path / STATE_FILE).is_file():
            continue
        _, metadata = read_tensors(path / STATE_FILE)
        found = metadata.get("run", "{}")
        if found != run:
            advice = (
                "To resume it, pass the same data and settings; to start a new run, use another output_dir"
                if resume
                else "Use another output_dir, or delete these checkpoints if they are no longer needed"
            )
            raise ConfigError(
                f"'{folder}' holds checkpoints of another run: '{path.name}' was written with "
                f"{difference(json.loads(found), json.loads(run))}. {advice}."
            )
        return path if resume else None
    return None


def difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """The facts in which two runs differ, with both values."""
    names = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    return ", ".join(f"{name}={found.get(name)!r} (this run has {expected.get(name)!r})" for name in names)


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)
