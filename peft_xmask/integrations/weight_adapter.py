"""The Trainer callback of the weight adapter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..core.files import write_tensors
from ..errors import PeftXMaskWarning
from ..tuners.base.sharded import writable
from ..tuners.in_place.tuner import find_table
from ..tuners.weight_adapter.model import adapted_layers
from .checkpoints import check_shape, checkpoint_folder, find_state
from .record import RecordCallback

STATE_FILE = "weight_adapter_training_state.safetensors"
"""Beside each checkpoint: per adapter ``<name>.<module>.<parameter>_<factor>`` and ``<name>.stored``."""


class WeightAdapterCallback(RecordCallback):
    """Makes resuming a run exact.

    An adapter's file holds the change that its factors make, which is enough for serving but not for an exact resume.
    This callback saves the factors beside each checkpoint and restores them on ``resume_from_checkpoint``, so that a
    resumed run ends with exactly the values of an uninterrupted one.

    Like its base class, it records in the config how the adapter is trained.

    Args:
        resume_from: the checkpoint's folder, if it is neither ``output_dir/checkpoint-<step>`` nor
            ``args.resume_from_checkpoint``.
    """

    def __init__(self, *, resume_from: str | Path | None = None) -> None:
        self.resume_from = resume_from

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the factors on resume."""
        super().on_train_begin(args, state, control, **kwargs)
        if state.global_step == 0:
            return
        found = find_state(args, state.global_step, STATE_FILE, self.resume_from)
        if found is None:
            warnings.warn(
                f"Resuming at step {state.global_step} without the factors of the adapter: no {STATE_FILE} of that "
                f"step in {checkpoint_folder(args, state.global_step)}. The run goes on from the change they made, "
                "with fresh factors on top. Pass WeightAdapterCallback(resume_from=...), the checkpoint's folder.",
                PeftXMaskWarning,
                stacklevel=2,
            )
            return
        path, tensors, _ = found
        _put_back(kwargs["model"], tensors, path)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the factors beside the checkpoint."""
        if not args.should_save:
            return
        tensors: dict[str, Tensor] = {}
        for name in _trained(kwargs["model"]):
            stored = find_table(kwargs["model"]).holders[name].weight
            if stored.any():
                tensors[f"{name}.stored"] = stored
            tensors |= {f"{name}.{key}": weight for key, weight in _factors(kwargs["model"], name).items()}
        metadata = {"global_step": str(state.global_step)}
        write_tensors(checkpoint_folder(args, state.global_step) / STATE_FILE, tensors, metadata)


def _factors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    return {
        f"{name}.{key.removeprefix('weight_adapter_')}": weight
        for name, layer in adapted_layers(model, adapter_name).items()
        for key, weight in layer.factors(adapter_name).items()
    }


def _trained(model: nn.Module) -> list[str]:
    """Names of the adapters that are being trained."""
    names = find_table(model).holders
    return [name for name in names if any(each.requires_grad for each in _factors(model, name).values())]


def _put_back(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    table, pairs = find_table(model), []
    for name in _trained(model):
        for key, weight in _factors(model, name).items():
            pairs.append((weight, check_shape(name, weight, tensors.get(f"{name}.{key}"), path)))
        holder = table.holders[name]
        kept = tensors.get(f"{name}.stored")
        stored = torch.zeros_like(holder.weight) if kept is None else check_shape(name, holder.weight, kept, path)
        holder.weight = stored.to(holder.weight)
    with writable(weight for weight, _ in pairs):
        for weight, stored in pairs:
            weight.copy_(stored)
