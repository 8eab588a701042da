"""The Trainer callback of X-PEFT."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..core.files import write_tensors
from ..core.masks import select_top_k
from ..errors import ConfigError, PeftXMaskWarning
from ..tuners.base.state import gathered, sharded_as
from ..tuners.xpeft.model import find_table
from ..tuners.xpeft.table import MaskTable
from .checkpoints import check_shape, checkpoint_folder, find_state
from .record import RecordCallback

STATE_FILE = "xpeft_training_state.safetensors"
"""Beside each checkpoint: per adapter ``<name>.logits [P, 2*S*N]`` and ``<name>.gain [P, S]``, float32."""


class XPEFTCallback(RecordCallback):
    """Gives masks their own learning rate, anneals their temperature, logs them, and makes a resumed run exact.

    A profile's file holds bits, which are enough to serve and not enough to go on training. This callback writes the
    logits beside each checkpoint and puts them back on ``resume_from_checkpoint``, so that an interrupted run ends with
    the very weights of an uninterrupted one.

    As its base class does, it notes in the config how the adapter is trained.

    Logged, beside the loss: ``mask_entropy`` (of the softmax over the N adapters, 1 = uniform), ``mask_churn`` (share
    of the chosen adapters that were not chosen at the last log) and ``mask_gain`` (mean gain, where it is learnt).

    Args:
        mask_learning_rate: of the logits, in force when the Trainer's learning rate is at its peak; it follows the same
            schedule. Works through ``logit_scale``, and so is exact for Adam-like optimizers. 0.1 won most often in the
            searches of docs/study.md. None: leave it to the config.
        temperature: start and end of a geometric annealing over the run; None: the config's, constant.
        resume_from: folder of the checkpoint, where it is not ``output_dir/checkpoint-<step>`` or
            ``args.resume_from_checkpoint``.

    Raises:
        ConfigError: a number that is not above 0.
    """

    def __init__(
        self,
        mask_learning_rate: float | None = 0.1,
        *,
        temperature: tuple[float, float] | None = None,
        resume_from: str | Path | None = None,
    ) -> None:
        for name, value in (
            ("mask_learning_rate", mask_learning_rate),
            *(("temperature", t) for t in temperature or ()),
        ):
            if value is not None and not value > 0:
                raise ConfigError(f"{name}={value!r} is invalid: expected a number above 0.")
        self.mask_learning_rate = mask_learning_rate
        self.temperature = temperature
        self.resume_from = resume_from
        self._last_choice: dict[str, Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the masks' learning rate; on a resume, put the logits back first."""
        super().on_train_begin(args, state, control, **kwargs)
        table = find_table(kwargs["model"])
        if state.global_step > 0:
            self._restore(table, args, state.global_step)
        for name in trained_adapters(table):
            if self.mask_learning_rate is not None and args.learning_rate > 0:
                set_logit_scale(kwargs["model"], table, name, self.mask_learning_rate / args.learning_rate)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Anneal the temperature."""
        if self.temperature is None:
            return
        start, end = self.temperature
        done = state.global_step / max(1, state.max_steps)
        table = find_table(kwargs["model"])
        for name in trained_adapters(table):
            table.temperature[name] = start * math.exp(done * math.log(end / start))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add mask statistics to what is logged."""
        super().on_log(args, state, control, **kwargs)
        logs = kwargs.get("logs")
        if logs is None or "loss" not in logs:
            return
        table = find_table(kwargs["model"])
        names = trained_adapters(table)
        for name in names:
            found = self._statistics(table, name)
            suffix = "" if len(names) == 1 else f"/{name}"
            logs.update({f"{key}{suffix}": value for key, value in found.items()})
        if state.log_history and "loss" in state.log_history[-1]:
            state.log_history[-1].update({key: value for key, value in logs.items() if key.startswith("mask_")})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the logits beside the checkpoint."""
        table = find_table(kwargs["model"])
        tensors, notes = {}, {}
        for name in trained_adapters(table):
            tensors[f"{name}.logits"] = gathered(table.xpeft_logits[name].weight)
            if name in table.xpeft_gain:
                tensors[f"{name}.gain"] = gathered(table.xpeft_gain[name].weight)
            notes[name] = {"logit_scale": table.logit_scale[name], "temperature": table.temperature[name]}
        if not args.should_save:  # as the Trainer's own files: by one process, though all have gathered
            return
        metadata = {"global_step": str(state.global_step), "adapters": json.dumps(notes)}
        write_tensors(checkpoint_folder(args, state.global_step) / STATE_FILE, tensors, metadata)

    def facts(self) -> dict[str, Any]:
        """The masks' learning rate and temperatures, where they are set here."""
        facts = {"mask_learning_rate": self.mask_learning_rate, "temperature": self.temperature}
        return {name: value for name, value in facts.items() if value is not None}

    def _restore(self, table: MaskTable, args: TrainingArguments, step: int) -> None:
        found = find_state(args, step, STATE_FILE, self.resume_from)
        if found is not None:
            path, tensors, metadata = found
            _put_back(table, tensors, metadata, path)
            return
        warnings.warn(
            f"Resuming at step {step} without the training state of the masks: no {STATE_FILE} of that step in "
            f"{checkpoint_folder(args, step)}. Pass XPEFTCallback(resume_from=...), the checkpoint's folder. "
            "Until then the run goes on from logits rebuilt from the bits.",
            PeftXMaskWarning,
            stacklevel=2,
        )

    def _statistics(self, table: MaskTable, name: str) -> dict[str, float]:
        spec = table.specs[name]
        with torch.no_grad():
            logits = gathered(table.xpeft_logits[name].weight).float().unflatten(1, spec.logits_shape[1:])
            soft = torch.softmax(logits * (table.logit_scale[name] / table.temperature[name]), dim=-1)
            entropy = -(soft * soft.clamp_min(1e-30).log()).sum(-1).mean() / max(math.log(spec.num_adapters), 1e-30)
            found = {"mask_entropy": round(float(entropy), 4)}
            if spec.mask_type == "hard":
                chosen = select_top_k(logits, spec.top_k)
                before = self._last_choice.get(name)
                if before is not None:
                    found["mask_churn"] = round(float((chosen & ~before).sum() / chosen.sum()), 4)
                self._last_choice[name] = chosen
            if name in table.xpeft_gain:
                _, gain_bits = table.pack(name, logits.flatten(1), table.xpeft_gain[name].weight)
                found["mask_gain"] = round(float(gain_bits.view(torch.float16).float().mean()), 4)
        return found


def trained_adapters(table: MaskTable) -> list[str]:
    """Names of the adapters that are being trained."""
    return [name for name, trained in table.xpeft_logits.items() if trained.weight.requires_grad]


def set_logit_scale(model: nn.Module, table: MaskTable, name: str, logit_scale: float) -> None:
    """Train an adapter's masks on another scale, and note it in its config."""
    table.rescale_logits(name, logit_scale)
    model.peft_config[name].logit_scale = logit_scale  # type: ignore[union-attr, index]


def _put_back(table: MaskTable, tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    notes = json.loads(metadata["adapters"])
    for name in trained_adapters(table):
        pairs = [(table.xpeft_logits[name].weight, tensors.get(f"{name}.logits"))]
        if name in table.xpeft_gain:
            pairs.append((table.xpeft_gain[name].weight, tensors.get(f"{name}.gain")))
        checked = [(weight, check_shape(name, weight, stored, path)) for weight, stored in pairs]
        with torch.no_grad():
            for weight, stored in checked:
                weight.copy_(sharded_as(weight, stored))
        table.logit_scale[name] = notes[name]["logit_scale"]
        table.temperature[name] = notes[name]["temperature"]
        table.rebuilt.discard(name)
