"""Record in an adapter's config how it was trained."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..tuners.base.config import TargetConfig


class RecordCallback(TrainerCallback):
    """Records how each adapter is trained, in ``config.training``.

    It is saved in ``adapter_config.json`` and shown on the model card: ``steps``, ``epochs``, ``batch_size`` (examples
    a step, over all processes), ``optimizer``, ``learning_rate`` (its peak), ``schedule``, ``seed``, and the last
    ``loss`` and ``eval_*`` numbers that were logged.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note what stays the same."""
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        facts = {
            "steps": state.global_step,
            "epochs": round(float(state.epoch or 0.0), 3),
            "batch_size": per_step,
            "optimizer": str(getattr(args.optim, "value", args.optim)),
            "learning_rate": args.learning_rate,
            "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            "seed": args.seed,
            **self.facts(),
        }
        for config in _trained(kwargs["model"]):
            config.training = dict(facts)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count."""
        self._note(kwargs["model"], {"steps": state.global_step, "epochs": round(float(state.epoch or 0.0), 3)})

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the last loss and the last evaluation."""
        logs = kwargs.get("logs") or {}
        timings = ("_runtime", "_per_second", "_time")
        wanted = {key: value for key, value in logs.items() if key == "loss" or key.startswith("eval_")}
        self._note(
            kwargs["model"],
            {key: value for key, value in wanted.items() if _is_number(value) and not key.endswith(timings)},
        )

    def facts(self) -> dict[str, Any]:
        """What a subclass has to add."""
        return {}

    def _note(self, model: Any, facts: dict[str, Any]) -> None:
        for config in _trained(model):
            if config.training is not None:
                config.training.update(facts)


def with_configs(model: nn.Module) -> Any:
    """The part of a Trainer's model that holds the configs of its adapters: a PeftModel, or a model of transformers.

    It is the model itself, or inside it where the model is a ``SentenceTransformer``. A model without adapters is
    returned as it is.
    """
    holders = (each for each in model.modules() if isinstance(getattr(each, "peft_config", None), dict))
    return next(holders, model)


def _is_number(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _trained(model: nn.Module) -> list[TargetConfig]:
    """Configs of the adapters of ours that are active, and so trained."""
    model = with_configs(model)
    configs = getattr(model, "peft_config", {})
    active = getattr(model, "active_adapters", [])
    names = active() if callable(active) else active  # a method of transformers' models, a property of PEFT's
    return [configs[name] for name in names if isinstance(configs.get(name), TargetConfig)]
