"""Training state that is saved beside the Trainer's checkpoints, because the adapter file cannot hold it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import TrainingArguments

from ..core.files import read_tensors
from ..errors import FileFormatError


def checkpoint_folder(args: TrainingArguments, step: int) -> Path:
    """The folder of the Trainer's checkpoint at a step."""
    assert args.output_dir is not None
    return Path(args.output_dir) / f"checkpoint-{step}"


def find_state(
    args: TrainingArguments, step: int, file: str, resume_from: str | Path | None
) -> tuple[Path, dict[str, Tensor], dict[str, str]] | None:
    """The training state at a step: its path, tensors and metadata; None if there is none.

    Args:
        file: its name.
        resume_from: a folder to look in first.
    """
    for folder in (resume_from, getattr(args, "resume_from_checkpoint", None), checkpoint_folder(args, step)):
        path = Path(folder) / file if isinstance(folder, (str, Path)) else None
        if path is None or not path.is_file():
            continue
        tensors, metadata = read_tensors(path)
        if metadata.get("global_step") == str(step):
            return path, tensors, metadata
    return None


def check_shape(adapter_name: str, weight: Tensor, stored: Tensor | None, path: Path) -> Tensor:
    """A tensor of the training state, for one of the model.

    Raises:
        FileFormatError: it is missing, or of another shape.
    """
    if stored is None or stored.shape != weight.shape:
        found = "nothing" if stored is None else tuple(stored.shape)
        raise FileFormatError(
            f"Expected the training state of adapter '{adapter_name}' with shape {tuple(weight.shape)} in '{path}', "
            f"found {found}. The checkpoint is of another run."
        )
    return stored
