"""How profiles are trained: everything but the model and the data."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import TrainingArguments

from ..bank.bank import ProfileBank
from ..core.fingerprint import digest_of
from ..errors import ConfigError
from ..tuners.xpeft import XPEFTConfig
from . import distributed as ranks
from .data import ProfileData
from .evaluation import ExampleLoss

HEADS = ("joint", "frozen", "first")
_POSITIVE = ("learning_rate", "head_learning_rate", "mask_learning_rate", "head_epochs")
_TOLD = ("head", "epochs", "batch_size", "learning_rate", "mask_learning_rate", "temperature", "seed")


@dataclass(frozen=True)
class Recipe:
    """How profiles are trained; see :func:`~peft_xmask.training.train.train_profiles`.

    Raises:
        ConfigError: a setting that cannot be, or settings that cannot be together.
    """

    args: TrainingArguments
    config: XPEFTConfig | None
    bank: ProfileBank | None
    data_collator: Callable[[list[dict[str, Any]]], Any]
    head: str
    head_learning_rate: float
    head_epochs: int
    mask_learning_rate: float
    temperature: float
    max_passes: float
    patience: int | None
    example_loss: ExampleLoss | None

    def __post_init__(self) -> None:
        if self.bank is not None and self.config is not None:
            raise ConfigError("Expected config= or bank=, found both: profiles that join a bank have its config.")
        if self.head not in HEADS:
            raise ConfigError(f"head={self.head!r} is not possible. Expected one of {', '.join(map(repr, HEADS))}.")
        if self.bank is not None and self.head != "frozen":
            raise ConfigError(
                f"head={self.head!r} is not possible with bank=: its profiles are served with the bank's head, which "
                "stays as it is. Pass head='frozen', or train a bank of its own."
            )
        for name in _POSITIVE:
            value = self.args.learning_rate if name == "learning_rate" else getattr(self, name)
            if not value > 0:
                raise ConfigError(f"{name}={value!r} is not possible. Expected a number above 0.")
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"patience={self.patience!r} is not possible. Expected at least one evaluation, or None.")

    @property
    def batch_size(self) -> int:
        """Examples of a batch, in all processes together."""
        return self.args.train_batch_size * ranks.count()

    def settings(self, data: ProfileData) -> dict[str, Any]:
        """What tells a run from others, as JSON can hold it."""
        return {
            "profiles": digest_of(_bytes(data.index.tensors["ends"], data.index.tensors["names"], data.rows)),
            "validation": None if data.held_out is None else digest_of(_bytes(data.held_out)),
            "head": self.head, "head_epochs": self.head_epochs, "epochs": self.args.num_train_epochs,
            "batch_size": self.batch_size, "accumulation": self.args.gradient_accumulation_steps,
            "learning_rate": self.args.learning_rate, "head_learning_rate": self.head_learning_rate,
            "mask_learning_rate": self.mask_learning_rate, "temperature": self.temperature,
            "max_passes": self.max_passes, "patience": self.patience, "seed": self.args.seed,
        }  # fmt: skip

    def told(self, data: ProfileData) -> dict[str, Any]:
        """What a bank's config says of its training."""
        settings = self.settings(data)
        return {"profiles": len(data.index), **{name: settings[name] for name in _TOLD}}


def arguments(args: TrainingArguments | None, beside: str) -> TrainingArguments:
    """Arguments of the Trainer as they are used here.

    Args:
        args: None: the defaults.
        beside: folder of the defaults.

    Raises:
        ConfigError: some that cannot be.
    """
    if args is None:
        args = TrainingArguments(
            output_dir=beside, per_device_train_batch_size=32, num_train_epochs=10, learning_rate=1e-2,
            save_strategy="no", report_to=[],
        )  # fmt: skip
    if args.fp16:
        raise ConfigError("fp16=True is not possible: gradients of rows are not scaled. Expected float32 or bf16=True.")
    if args.deepspeed or args.fsdp:
        raise ConfigError("FSDP and DeepSpeed are not possible: rows are whole in each process. Expected DDP.")
    args = copy.copy(args)
    args.remove_unused_columns, args.max_steps = False, -1
    args.eval_strategy, args.load_best_model_at_end, args.eval_on_start = "no", False, False  # type: ignore[assignment]
    args.disable_tqdm, args.push_to_hub = True, False
    if args.save_total_limit is not None:
        args.save_total_limit = max(2, args.save_total_limit)
    return args


def _bytes(*tensors: Tensor) -> Iterator[bytes]:
    return (tensor.numpy().tobytes() for tensor in tensors)


def digest(facts: Any) -> str:
    """16 hexadecimal digits that tell facts from others."""
    encoded = json.dumps(
        facts, sort_keys=True, default=lambda value: sorted(value) if isinstance(value, set) else str(value)
    )
    return hashlib.sha256(encoded.encode()).hexdigest()[:16]
