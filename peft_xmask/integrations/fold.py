"""Fold adapters that change the base's parameters permanently into them."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from ..errors import ConfigError
from ..tuners.in_place.tuner import InPlaceTuner


def fold(model: nn.Module, path: str | Path) -> None:
    """Write the base model with the active adapters in its parameters: a plain transformers checkpoint.

    It has the base's tensors and config and nothing else: ``from_pretrained`` reads it without peft and without this
    package, and its outputs are those of the adapted model, bit for bit. ``modules_to_save``, such as a head, are
    included. The model itself is not modified. Memory: a second copy of the model while this runs.

    Args:
        model: a PEFT model with weight adapters or magnitude masks, over a model of transformers.
        path: folder to write to; each file in it is replaced at once when all are written.

    Raises:
        ConfigError: the method is not supported, no adapter is active, or the base cannot be saved by itself.
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(model, PeftModel) or not isinstance(tuner, InPlaceTuner):
        raise ConfigError(
            f"Expected a PEFT model with weight adapters or magnitude masks, found a {type(model).__name__}. Other "
            "methods are no numbers of the base: use merge_and_unload where they can be merged."
        )
    if not hasattr(tuner.model, "save_pretrained"):
        raise ConfigError(f"Expected a model of transformers as the base, found a {type(tuner.model).__name__}.")
    if not tuner.active_adapters:
        raise ConfigError("Expected an active adapter, found none. Call model.set_adapter first.")
    twin: Any = copy.deepcopy(model)
    folded = twin.merge_and_unload()
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fold-") as beside:
        folded.save_pretrained(beside)
        for file in sorted(Path(beside).iterdir()):
            file.replace(folder / file.name)
