"""Settings of a training run: everything but the model and the data."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..errors import ConfigError
from ..tuners.xpeft import XPEFTConfig
from . import distributed as ranks
from .defaults import changed, padding_collator
from .evaluation import ExampleLoss

HEADS = ("joint", "frozen", "first")
_POSITIVE = ("learning_rate", "head_learning_rate", "mask_learning_rate", "head_epochs")
_SHOWN = ("head", "epochs", "batch_size", "learning_rate", "mask_learning_rate", "sampling_temperature", "seed")
_OF_ARGS = (
    "learning_rate", "seed", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "lr_scheduler_type", "warmup_steps", "bf16",
)  # fmt: skip
_NO_IDENTITY: dict[str, Any] = {"identity": False}


@dataclass(frozen=True)
class ProfileTraining:
    """Settings of a training run, for :func:`~peft_xmask.training.train.train_profiles`.

    An epoch draws ``d_u = min(N n_u^(1/T) / sum_v n_v^(1/T), max_passes n_u)`` examples of a profile that has n_u of
    all N (:func:`~peft_xmask.training.sampler.draws_per_epoch`).

    Args:
        profile_column: column with the name of each example's profile.
        config: of the adapter, if the model is a base. None: that of the bank which the profiles join, or
            ``XPEFTConfig(task_type="SEQ_CLS")``. Its ``num_profiles`` and ``logit_scale`` are set by the run.
        args: of the Trainer. None: 10 epochs of batches of 32 at a learning rate of 1e-2, without checkpoints.
            ``max_steps`` and the settings for evaluation are ignored, ``max_grad_norm`` applies to the head only, and
            at least two checkpoints are kept.
        processing_class: tokenizer that pads batches.
        data_collator: makes a batch of everything but the profiles. None: pads with ``processing_class`` if there is
            one.
        head: how the head that all profiles share is trained. ``"joint"``: together with the profiles (at the end each
            profile's rows are compared under the final head). ``"frozen"``: not at all. ``"first"``: alone, without an
            adapter, for ``head_epochs``; then it is frozen. None:
            ``"frozen"`` when joining a bank, ``"first"`` with ``offset``, trained with the
            common adapter if there is one, otherwise ``"joint"``.
        head_learning_rate: None: that of ``args``.
        head_epochs: epochs of ``head="first"``.
        common_size: width of a bottleneck adapter that is trained on all examples first, with the head, and then always
            on: masks deviate from it. It becomes the common part of the pool, which is saved in ``output_dir``. 0:
            none.
        common_epochs: epochs of the common adapter; the best by validation is kept.
        common_learning_rate: learning rate of the common adapter and the head, falling to 0.
        offset: give each profile an offset beside its mask: a half-precision number for each output, which is added to
            it. Offsets are computed, not trained: the most likely ones under a prior whose variance is chosen on the
            validation examples. They need a head that is trained before the profiles, or not at all.
        mask_learning_rate: learning rate of the mask logits.
        prior_strength: over a fitted pool, the weight of the prior fitted with it: ``minus_log_prior / n`` is added to
            the loss of each of a profile's n training examples, so that a profile stays near the common part until its
            examples say otherwise. 1 is the variance of the groups' adapters, part of which is noise of their training;
            3 is what keeps people with five labels from doing worse than the common part. 0: no prior. Losses are taken
            as nats. Other pools have no prior.
        cache: keep the hidden states before the first adapted block on disk, in the model's dtype, and start each pass
            over an example from there. ``"auto"``: in a temporary folder, if there is anything to keep. A folder: in
            it, where the next run on the same base and examples finds them. None: compute them each time. They are
            computed without dropout, so a base with dropout trains a little differently than without a cache.
        sampling_temperature: T above. 1 draws every example once an epoch; a higher T gives profiles with few examples
            more passes.
        max_passes: most passes over an example in one epoch.
        patience: evaluations without improvement after which a profile stops. None: profiles never stop early.
        example_loss: computes the validation loss of each example from a model's outputs and the batch. None:
            :func:`~peft_xmask.training.evaluation.example_losses`.

    Raises:
        ConfigError: an invalid value, or settings that exclude each other.
    """

    profile_column: str = "user"
    config: XPEFTConfig | None = field(default=None, metadata=_NO_IDENTITY)  # the adapter made from it is recorded
    args: TrainingArguments | None = field(default=None, metadata=_NO_IDENTITY)  # so are those that matter
    processing_class: Any = field(default=None, metadata=_NO_IDENTITY)
    data_collator: Callable[[list[dict[str, Any]]], Any] | None = field(default=None, metadata=_NO_IDENTITY)
    head: str | None = None
    head_learning_rate: float | None = None
    head_epochs: int = 1
    common_size: int = 0
    common_epochs: int = 3
    common_learning_rate: float = 1e-3
    offset: bool = False
    mask_learning_rate: float = 0.1
    prior_strength: float = 3.0
    cache: str | os.PathLike[str] | None = field(default=None, metadata=_NO_IDENTITY)  # identity() says if there is one
    sampling_temperature: float = 2.0
    max_passes: float = 4.0
    patience: int | None = 3
    example_loss: ExampleLoss | None = field(default=None, metadata=_NO_IDENTITY)

    def __post_init__(self) -> None:
        if self.head is not None and self.head not in HEADS:
            raise ConfigError(f"head={self.head!r} is invalid: expected one of {', '.join(map(repr, HEADS))}.")
        self._check_numbers()
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"patience={self.patience!r} is invalid: expected at least one evaluation, or None.")
        if self.common_size < 0 or self.common_epochs < 1 or not self.common_learning_rate > 0:
            raise ConfigError(
                f"common_size={self.common_size!r}, common_epochs={self.common_epochs!r} and common_learning_rate="
                f"{self.common_learning_rate!r} are invalid: expected a size of at least 0, at least one epoch, and a "
                "rate above 0."
            )
        if self.common_size and self.head not in (None, "first"):
            raise ConfigError(
                f"head={self.head!r} is invalid with common_size={self.common_size}: the head is trained with the "
                "common adapter. Pass head='first'."
            )
        if self.common_size and self.args is None:
            raise ConfigError("Expected args= with common_size=, found none: the pool is saved in its output_dir.")
        if self.offset and self.head == "joint":
            raise ConfigError(
                "head='joint' is invalid with offset=True: offsets are computed before the profiles are trained and "
                "must not be moved by the head afterwards. Pass head='first' or head='frozen'."
            )
        if self.args is not None:
            _check_arguments(self.args, cached=self.cache is not None)

    def _check_numbers(self) -> None:
        for name in _POSITIVE:
            value = getattr(self.args, name, None) if name == "learning_rate" else getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name}={value!r} is invalid: expected a number above 0.")
        for name in ("sampling_temperature", "max_passes"):
            if not getattr(self, name) >= 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} is invalid: expected a number of at least 1.")
        if not 0 <= self.prior_strength < math.inf:
            raise ConfigError(f"prior_strength={self.prior_strength!r} is invalid: expected a number of at least 0.")

    @classmethod
    def of(cls, settings: ProfileTraining | None, changes: dict[str, Any]) -> ProfileTraining:
        """Settings with some fields changed.

        Args:
            settings: None: the defaults.
            changes: values by name of the field.

        Raises:
            ConfigError: a name that is not a field, or an invalid value.
        """
        return changed(cls, settings, changes)

    def resolved(self, *, joins_bank: bool, folder: str) -> ProfileTraining:
        """The same settings with every default filled in.

        Args:
            joins_bank: whether the profiles join an existing bank.
            folder: where the Trainer may write if ``args`` does not say.

        Raises:
            ConfigError: settings that do not suit a bank.
        """
        if joins_bank and self.common_size:
            raise ConfigError("common_size= is invalid with bank=: profiles that join a bank have its pool.")
        if joins_bank and self.config is not None:
            raise ConfigError("Expected config= or bank=, found both: profiles that join a bank have its config.")
        head = self.head or ("frozen" if joins_bank else "first" if self.offset or self.common_size else "joint")
        if joins_bank and head != "frozen":
            raise ConfigError(
                f"head={head!r} is invalid with bank=: the bank's head serves its other profiles too and must not "
                "change. Pass head='frozen', or train a bank of its own."
            )
        args = _trainer_arguments(self.args, folder)
        collator = self.data_collator or padding_collator(self.processing_class)
        return dataclasses.replace(
            self,
            args=args,
            data_collator=collator,
            head=head,
            head_learning_rate=self.head_learning_rate or args.learning_rate,
        )

    def in_folder(self, folder: str, **changes: Any) -> ProfileTraining:
        """The same settings for a run that writes to another folder.

        Args:
            folder: the new ``args.output_dir``.
            changes: other fields to change.
        """
        args = copy.copy(self.trainer)
        args.output_dir = folder
        return dataclasses.replace(self, args=args, **changes)

    @property
    def trainer(self) -> TrainingArguments:
        """The arguments of the Trainer, of settings that were resolved."""
        assert self.args is not None
        return self.args

    @property
    def batch_size(self) -> int:
        """Examples in a batch, over all processes."""
        return self.trainer.train_batch_size * ranks.count()

    @property
    def grouped_by_length(self) -> bool:
        """Whether a batch has examples of about the same length."""
        return getattr(self.trainer, "train_sampling_strategy", None) == "group_by_length"

    def identity(self) -> dict[str, Any]:
        """What distinguishes these settings from others, in types that JSON has.

        Functions, such as a collator, are not compared.
        """
        compared = [each.name for each in dataclasses.fields(self) if each.metadata.get("identity", True)]
        args = {name: getattr(self.trainer, name) for name in _OF_ARGS}
        args["lr_scheduler_type"] = str(getattr(args["lr_scheduler_type"], "value", args["lr_scheduler_type"]))
        return {
            **{name: getattr(self, name) for name in compared},
            **args,
            "epochs": self.trainer.num_train_epochs,
            "batch_size": self.batch_size,
            "accumulation": self.trainer.gradient_accumulation_steps,
            **({} if self.cache is None else {"cached": True}),
            **({"sampling": "group_by_length"} if self.grouped_by_length else {}),
        }

    def summary(self) -> dict[str, Any]:
        """What a bank's config records of its training."""
        identity = self.identity()
        return {name: identity[name] for name in _SHOWN}

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which has devices of its own: the arguments' fields in place of the arguments."""
        state = dict(self.__dict__)
        if self.args is not None:
            fields = {each.name: getattr(self.args, each.name) for each in dataclasses.fields(self.args) if each.init}
            state["args"] = (type(self.args), fields)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["args"] is not None:
            kind, fields = state["args"]
            state = {**state, "args": kind(**fields)}
        self.__dict__.update(state)


def _check_arguments(args: TrainingArguments, *, cached: bool) -> None:
    if cached and args.torch_compile:
        raise ConfigError(
            "cache= is invalid with torch_compile=True: a compiled model cannot skip blocks. Use one of the two."
        )
    if args.fp16:
        raise ConfigError(
            "fp16=True is invalid: the gradients of profiles are not scaled. Expected float32 or bf16=True."
        )
    if args.deepspeed or args.fsdp:
        raise ConfigError(
            "FSDP and DeepSpeed are not supported: every process holds all rows of its profiles. Use DDP."
        )


def _trainer_arguments(args: TrainingArguments | None, folder: str) -> TrainingArguments:
    """A copy that leaves sampling, evaluation and progress to the run."""
    if args is None:
        args = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=32, num_train_epochs=10, learning_rate=1e-2,
            save_strategy="no", report_to=[],
        )  # fmt: skip
    args = copy.copy(args)
    args.remove_unused_columns, args.max_steps = False, -1
    args.eval_strategy, args.load_best_model_at_end, args.eval_on_start = "no", False, False  # type: ignore[assignment]
    args.disable_tqdm, args.push_to_hub = True, False
    if args.save_total_limit is not None:
        args.save_total_limit = max(2, args.save_total_limit)
    return args
