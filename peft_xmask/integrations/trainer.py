"""The Trainer callback of X-PEFT."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..core.files import write_tensors
from ..core.masks import select_top_k
from ..errors import ConfigError, PeftXMaskWarning
from ..tuners.base.sharded import gathered, sharded_as, writable
from ..tuners.xpeft.masks import AdapterMasks
from ..tuners.xpeft.table import MaskTable, find_table
from .checkpoints import check_shape, checkpoint_folder, find_state
from .record import RecordCallback, with_configs

STATE_FILE = "xpeft_training_state.safetensors"
"""Beside each checkpoint: per adapter ``<name>.logits [P, 2*S*N]`` and ``<name>.gain [P, S]``, float32."""


class XPEFTCallback(RecordCallback):
    """Gives masks their own learning rate, anneals their temperature, logs them, and makes a resumed run exact.

    A profile's file holds bits, which are enough for serving but not for resuming training. This callback saves the
    logits beside each checkpoint and restores them on ``resume_from_checkpoint``, so that a resumed run ends with
    exactly the weights of an uninterrupted one.

    Like its base class, it records in the config how the adapter is trained.

    It logs ``mask_entropy`` (of the softmax over the N adapters, 1 = uniform), ``mask_churn`` (share
    of the chosen adapters that were not chosen at the last log) and ``mask_gain`` (mean gain, where it is learnt).

    Args:
        mask_learning_rate: peak learning rate of the logits; it follows the Trainer's schedule. It is implemented
            through ``logit_scale``, which is equivalent for Adam-like optimizers. 0.1 won most often in the
            searches of docs/study.md. None: leave it to the config.
        temperature: start and end of a geometric annealing over the run; None: the config's constant temperature.
        resume_from: the checkpoint's folder, if it is neither ``output_dir/checkpoint-<step>`` nor
            ``args.resume_from_checkpoint``.

    Raises:
        ConfigError: a number is not above 0.
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
        """Set the masks' learning rate; on resume, restore the logits first."""
        super().on_train_begin(args, state, control, **kwargs)
        table = find_table(kwargs["model"])
        if state.global_step > 0:
            self._restore(table, args, state.global_step)
        for masks in trained_adapters(table):
            if self.mask_learning_rate is not None and args.learning_rate > 0:
                set_logit_scale(kwargs["model"], masks, self.mask_learning_rate / args.learning_rate)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Anneal the temperature."""
        if self.temperature is None:
            return
        start, end = self.temperature
        done = state.global_step / max(1, state.max_steps)
        table = find_table(kwargs["model"])
        for masks in trained_adapters(table):
            masks.form = replace(masks.form, temperature=start * math.exp(done * math.log(end / start)))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add mask statistics to what is logged."""
        super().on_log(args, state, control, **kwargs)
        logs = kwargs.get("logs")
        if logs is None or "loss" not in logs:
            return
        table = find_table(kwargs["model"])
        trained = trained_adapters(table)
        for masks in trained:
            found = self._statistics(masks)
            suffix = "" if len(trained) == 1 else f"/{masks.name}"
            logs.update({f"{key}{suffix}": value for key, value in found.items()})
        if state.log_history and "loss" in state.log_history[-1]:
            state.log_history[-1].update({key: value for key, value in logs.items() if key.startswith("mask_")})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the logits beside the checkpoint."""
        table = find_table(kwargs["model"])
        tensors, notes = {}, {}
        for masks in trained_adapters(table):
            tensors.update({f"{masks.name}.{part}": gathered(it) for part, it in masks.trained_state().items()})
            notes[masks.name] = {"logit_scale": masks.form.logit_scale, "temperature": masks.form.temperature}
        if not args.should_save:  # as the Trainer's own files: by one process, though all have gathered
            return
        metadata = {"global_step": str(state.global_step), "adapters": json.dumps(notes)}
        write_tensors(checkpoint_folder(args, state.global_step) / STATE_FILE, tensors, metadata)

    def facts(self) -> dict[str, Any]:
        """The masks' learning rate and temperatures, if this callback sets them."""
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

    def _statistics(self, masks: AdapterMasks) -> dict[str, float]:
        spec, state = masks.spec, masks.trained_state()
        with torch.no_grad():
            weight = gathered(state["logits"])
            logits = masks.form.logits(weight)
            soft = torch.softmax(logits * (masks.form.logit_scale / masks.form.temperature), dim=-1)
            entropy = -(soft * soft.clamp_min(1e-30).log()).sum(-1).mean() / max(math.log(spec.num_adapters), 1e-30)
            found = {"mask_entropy": round(float(entropy), 4)}
            if spec.mask_type == "hard":
                chosen = select_top_k(logits, spec.top_k)
                before = self._last_choice.get(masks.name)
                if before is not None:
                    found["mask_churn"] = round(float((chosen & ~before).sum() / chosen.sum()), 4)
                self._last_choice[masks.name] = chosen
            if "gain" in state:
                _, gain_bits = masks.form.pack(weight, state["gain"])
                found["mask_gain"] = round(float(gain_bits.view(torch.float16).float().mean()), 4)
        return found


def trained_adapters(table: MaskTable) -> list[AdapterMasks]:
    """The adapters that are being trained."""
    return [
        masks for masks in table.adapters.values() if any(each.requires_grad for each in masks.trained_state().values())
    ]


def set_logit_scale(model: nn.Module, masks: AdapterMasks, logit_scale: float) -> None:
    """Change the scale of an adapter's logits, also in its config."""
    masks.rescale_logits(logit_scale)
    with_configs(model).peft_config[masks.name].logit_scale = logit_scale


def _put_back(table: MaskTable, tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    notes = json.loads(metadata["adapters"])
    for masks in trained_adapters(table):
        name, weights = masks.name, masks.trained_state()
        with writable(weights.values()):
            checked = [
                (weight, check_shape(name, weight, tensors.get(f"{name}.{part}"), path))
                for part, weight in weights.items()
            ]
            for weight, stored in checked:
                weight.copy_(sharded_as(weight, stored))
        noted = {key: notes[name][key] for key in ("logit_scale", "temperature")}
        masks.form = replace(masks.form, **noted)
        masks.rebuilt = False
