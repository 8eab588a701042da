"""Saving an adapter as a whole.

PEFT's ``save_pretrained`` writes one file after another into the adapter's folder: first the model card, then the
tensors, then the config, which is emptied before it is filled. If the process dies in between, or the tensors are
refused, the good adapter that was there is damaged. No tuner or config learns of the save before the first file is
written, so the method itself has to be wrapped.
"""

from __future__ import annotations

import functools
import inspect
import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel

from ...core.adapter_folder import ADAPTER_FILE, CONFIG_FILE
from ...core.files import write_folder
from .config import TargetConfig

_CARD_FILE = "README.md"


def save_adapters_as_a_whole() -> None:
    """Let PEFT's models write adapters of ours into a temporary folder and move the files when all are written.

    Models without an adapter of ours save as before. Calling this twice is harmless.
    """
    save = PeftModel.save_pretrained
    if hasattr(save, "saves_as_a_whole"):
        return
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_pretrained(self: PeftModel, save_directory: str, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, save_directory, *args, **kwargs).arguments
        names = given.get("selected_adapters") or list(self.peft_config)
        ours = any(isinstance(self.peft_config.get(name), TargetConfig) for name in names)
        folder = Path(save_directory)
        if not ours or folder.is_file() or not given.get("is_main_process", True):
            save(self, save_directory, *args, **kwargs)
            return
        with write_folder(folder, last=(ADAPTER_FILE, CONFIG_FILE, _CARD_FILE)) as beside:
            for card in (_CARD_FILE, *(f"{name}/{_CARD_FILE}" for name in names)):  # cards are continued, not replaced
                if (folder / card).is_file():
                    (beside / card).parent.mkdir(exist_ok=True)
                    shutil.copyfile(folder / card, beside / card)
            save(self, str(beside), *args, **kwargs)

    save_pretrained.saves_as_a_whole = True  # type: ignore[attr-defined]
    PeftModel.save_pretrained = save_pretrained  # type: ignore[method-assign]
