"""Settings of ``personalize``, and how one run of it is carried out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..pool import AdapterPool


@dataclass(frozen=True)
class PersonalizeSettings:
    """What people's profiles are and how they are trained.

    Attributes:
        max_length: tokens after which a text is cut.
        num_adapters: adapters in a random pool.
        bottleneck_size: width of a random pool's adapters.
        layers: how many of the last blocks are adapted; None: all.
        epochs: passes over the data for the masks; 0: no masks.
        batch_size: texts in a step.
        mask_learning_rate: learning rate of the masks.
        patience: evaluations without improvement after which a person's training stops.
        min_labels: a person with fewer training examples has no profile and is served by the common part.
        common_size: width of the adapter that all people share, for a language model whose pool has none; 0: none.
            For other tasks the common part is a head.
        common_epochs: passes over the data for that adapter; the best by validation is kept.
        group_steps: steps of each person's adapter when a pool is fitted (``pool="fit"``).
        seed: of the masks' start, the order of the data and dropout.

    Raises:
        ConfigError: an invalid value.
    """

    max_length: int = 128
    num_adapters: int = 104
    bottleneck_size: int = 12
    layers: int | None = 2
    epochs: float = 4.0
    batch_size: int = 32
    mask_learning_rate: float = 0.1
    patience: int | None = 2
    min_labels: int = 3
    common_size: int = 16
    common_epochs: int = 10
    group_steps: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"max_length": 3, "num_adapters": 2, "bottleneck_size": 1, "batch_size": 1, "min_labels": 1}
        least |= {"common_size": 0, "common_epochs": 1, "group_steps": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ConfigError(f"{name}={getattr(self, name)!r} is invalid: expected at least {value}.")
        if not self.mask_learning_rate > 0:
            raise ConfigError(f"mask_learning_rate={self.mask_learning_rate!r} is invalid: expected a number above 0.")
        if not self.epochs >= 0:
            raise ConfigError(f"epochs={self.epochs!r} is invalid: expected a number of at least 0.")
        if self.layers is not None and self.layers < 1:
            raise ConfigError(f"layers={self.layers!r} is invalid: expected at least 1, or None for all blocks.")


@dataclass(frozen=True)
class Execution:
    """Where a run is carried out and how it is watched; none of it changes the bank, except the number of workers.

    Attributes:
        folder: for checkpoints.
        pool: directions of the masks; None: a random pool.
        ray: workers, each of which trains a part of the people; None: this process trains all.
        resume: continue from the last checkpoint in ``folder``.
        progress: show a bar.
    """

    folder: Path
    pool: AdapterPool | None = None
    ray: int | None = None
    resume: bool = False
    progress: bool = False
