"""How long and how fast a classifier is trained."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError


@dataclass(frozen=True)
class TrainSettings:
    """How long and how fast to train.

    Attributes:
        max_steps: optimizer steps; None: as many as ``epochs`` make.
        epochs: passes over the data, when ``max_steps`` is None.
        batch_size: examples in a step.
        learning_rate: AdamW's, decayed linearly to zero after the warm-up.
        head_learning_rate: of the head; None: ``learning_rate``. A fresh linear head wants larger steps than adapters.
        mask_learning_rate: of X-PEFT's masks; other methods have none.
        warmup: share of the steps in which learning rates rise from zero.
        checkpoint_every: steps between checkpoints; 0: none.
        seed: of the order of the data and of dropout.
    """

    max_steps: int | None = None
    epochs: float = 3.0
    batch_size: int = 32
    learning_rate: float = 3e-3
    head_learning_rate: float | None = None
    mask_learning_rate: float = 0.1
    warmup: float = 0.06
    checkpoint_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "learning_rate", "mask_learning_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)!r} is invalid: expected a number above 0.")
        if self.head_learning_rate is not None and not self.head_learning_rate > 0:
            raise ConfigError(f"head_learning_rate={self.head_learning_rate!r} is invalid: expected a number above 0.")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup={self.warmup!r} is invalid: expected a share of the steps, at least 0, below 1.")
        if self.max_steps is not None and self.max_steps < 1:
            raise ConfigError(f"max_steps={self.max_steps} is invalid: expected at least 1.")
