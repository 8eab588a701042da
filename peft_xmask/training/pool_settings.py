"""Settings of fitting a pool: everything but the model and the data."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..errors import ConfigError
from ..tuners.bottleneck import BottleneckConfig
from .defaults import changed, padding_collator
from .evaluation import ExampleLoss

GROUP_HEADS = ("shared", "own")
_NO_IDENTITY: dict[str, Any] = {"identity": False}
_OF_ARGS = ("seed", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "warmup_steps", "bf16")
_LEAST = {"size": 4, "principal": 1, "max_groups": 2, "min_examples": 1, "group_steps": 1}


@dataclass(frozen=True)
class PoolFitting:
    """Settings of :func:`~peft_xmask.training.fit_pool.fit_pool`.

    Args:
        profile_column: column with the name of each example's person or task.
        held_out: names whose examples are left out of everything, for a test on people or tasks never seen.
        config: of the adapters that are trained: their width, sites, form and ``task_type``. None:
            ``BottleneckConfig(bottleneck_size=24, task_type="SEQ_CLS")``.
        args: of the Trainer for the common adapter. None: 3 epochs of batches of 32 at a learning rate of 1e-3, in a
            temporary folder, which cannot be resumed. ``output_dir`` keeps what is finished.
        processing_class: tokenizer that pads batches.
        data_collator: makes a batch. None: pads with ``processing_class`` if there is one.
        size: N, directions of the pool.
        principal: K, principal directions that are kept, of which the pool's are mixtures; at most the number of groups
            minus one, and at most ``size // 2 - 1``.
        max_groups: the people or tasks with the most examples, at most so many, get an adapter of their own, from which
            the directions come. All train the common adapter.
        min_examples: a person or task with fewer examples gets none.
        group_steps: optimizer steps of a group's adapter, which starts at the common one.
        group_learning_rate: of a group's adapter, falling to 0.
        head_learning_rate: of the head. None: that of the adapter.
        group_head: ``"shared"``: a group's adapter learns below the head that was trained with the common adapter,
            which is frozen. ``"own"``: it learns with a fresh head for the group's labels alone, as a new task will.
            None: ``"own"`` if no two groups share a label and each has several, otherwise ``"shared"``.
        example_loss: computes the validation loss of each example. None:
            :func:`~peft_xmask.training.evaluation.example_losses`.
        data_name: what the pool's card calls the data.

    Raises:
        ConfigError: an invalid value.
    """

    profile_column: str = "user"
    held_out: tuple[str, ...] = ()
    config: BottleneckConfig | None = field(default=None, metadata=_NO_IDENTITY)  # the adapter made from it is recorded
    args: TrainingArguments | None = field(default=None, metadata=_NO_IDENTITY)  # so are those that matter
    processing_class: Any = field(default=None, metadata=_NO_IDENTITY)
    data_collator: Callable[[list[dict[str, Any]]], Any] | None = field(default=None, metadata=_NO_IDENTITY)
    size: int = field(default=100, metadata=_NO_IDENTITY)  # of the pool; its adapters are the same for all sizes
    principal: int = field(default=16, metadata=_NO_IDENTITY)
    max_groups: int = 64
    min_examples: int = 16
    group_steps: int = 100
    group_learning_rate: float = 1e-3
    head_learning_rate: float | None = None
    group_head: str | None = None
    example_loss: ExampleLoss | None = field(default=None, metadata=_NO_IDENTITY)
    data_name: str | None = field(default=None, metadata=_NO_IDENTITY)

    def __post_init__(self) -> None:
        object.__setattr__(self, "held_out", tuple(self.held_out))
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)!r} is invalid: expected at least {least}.")
        for name in ("group_learning_rate", "head_learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name}={value!r} is invalid: expected a number above 0.")
        if self.group_head is not None and self.group_head not in GROUP_HEADS:
            expected = " or ".join(map(repr, GROUP_HEADS))
            raise ConfigError(f"group_head={self.group_head!r} is invalid: expected {expected}, or None.")
        if self.config is not None and self.config.layer_norm:
            raise ConfigError("layer_norm=True is invalid: deviations of a normalised adapter do not add up.")
        if self.args is not None and (self.args.deepspeed or self.args.fsdp or self.args.fp16):
            raise ConfigError("fp16, FSDP and DeepSpeed are not supported. Use float32 or bf16=True, with DDP.")

    @classmethod
    def of(cls, settings: PoolFitting | None, changes: dict[str, Any]) -> PoolFitting:
        """Settings with some fields changed.

        Args:
            settings: None: the defaults.
            changes: values by name of the field.

        Raises:
            ConfigError: a name that is not a field, or an invalid value.
        """
        return changed(cls, settings, changes)

    def resolved(self, folder: str) -> PoolFitting:
        """The same settings with every default filled in.

        Args:
            folder: where the Trainer may write if ``args`` does not say.
        """
        args = self.args
        if args is None:
            args = TrainingArguments(
                output_dir=folder, per_device_train_batch_size=32, num_train_epochs=3, learning_rate=1e-3,
                save_strategy="no", report_to=[],
            )  # fmt: skip
        args = copy.copy(args)
        args.remove_unused_columns, args.disable_tqdm, args.push_to_hub = False, True, False
        args.eval_strategy, args.load_best_model_at_end, args.eval_on_start = "no", False, False  # type: ignore[assignment]
        collator = self.data_collator or padding_collator(self.processing_class)
        config = copy.copy(self.config or BottleneckConfig(bottleneck_size=24, task_type="SEQ_CLS"))
        return dataclasses.replace(self, args=args, data_collator=collator, config=config)

    @property
    def trainer(self) -> TrainingArguments:
        """The arguments of the Trainer, of settings that were resolved."""
        assert self.args is not None
        return self.args

    def identity(self) -> dict[str, Any]:
        """What distinguishes these settings from others, in types that JSON has.

        Functions, such as a collator, are not compared.
        """
        compared = [each.name for each in dataclasses.fields(self) if each.metadata.get("identity", True)]
        args = self.trainer
        kind = args.lr_scheduler_type
        return {
            **{name: getattr(self, name) for name in compared if name != "held_out"},
            "held_out": len(self.held_out),
            **{name: getattr(args, name) for name in _OF_ARGS},
            "lr_scheduler_type": str(getattr(kind, "value", kind)),
            "learning_rate": args.learning_rate,
            "epochs": args.num_train_epochs,
            "max_steps": args.max_steps,
            "batch_size": args.train_batch_size,
            "accumulation": args.gradient_accumulation_steps,
        }
