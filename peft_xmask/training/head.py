"""Training the head that all profiles share, before any of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..core.files import read_tensors, write_tensors
from ..errors import ConfigError
from . import distributed as ranks
from .profile_model import ProfileModel
from .row_adamw import hide_rows
from .settings import ProfileTraining
from .trainer import BarCallback, ProfileTrainer

HEAD_FILE = "head.safetensors"


def train_head(
    profiles: ProfileModel,
    folder: Path,
    run: str,
    settings: ProfileTraining,
    trainer: Callable[..., ProfileTrainer],
    collator: Callable[[list[dict[str, Any]]], Any],
) -> None:
    """Train the head on the base without an adapter and keep it in a file, or read it if the same run wrote one.

    Args:
        profiles: whose head is trained. Afterwards its rows have gradients and its head has none.
        folder: of the file.
        run: identity of the run.
        settings: resolved ones.
        trainer: makes a Trainer; called with an optimizer, callbacks and other arguments of the Trainer.
        collator: makes batches with ``adapter_names``.

    Raises:
        ConfigError: the model has no head.
    """
    head = profiles.head()
    if not head:
        raise ConfigError(
            "Expected a model with a head to train first, found none. Pass a task_type such as 'SEQ_CLS' in the "
            "config, or head='frozen'."
        )
    path = folder / HEAD_FILE
    if path.is_file():
        tensors, metadata = read_tensors(path)
        if metadata.get("run") == run and tensors.keys() == head.keys():
            with torch.no_grad():
                for key, parameter in head.items():
                    parameter.copy_(tensors[key])
            return

    def on_the_base(examples: list[dict[str, Any]]) -> Any:
        batch = collator(examples)
        batch["adapter_names"] = torch.full_like(batch["adapter_names"], -1)
        return batch

    args = copy.copy(settings.trainer)
    args.num_train_epochs, args.save_strategy = settings.head_epochs, "no"  # type: ignore[assignment]
    rows = list(profiles.weights().values())
    for parameter in (*rows, *head.values()):
        parameter.requires_grad_(any(parameter is each for each in head.values()))
    hide_rows(profiles.model)
    optimizer = torch.optim.AdamW(
        head.values(), lr=settings.head_learning_rate or args.learning_rate, weight_decay=args.weight_decay
    )
    trainer(optimizer, [BarCallback("head")], args=args, data_collator=on_the_base).train()
    for parameter in (*rows, *head.values()):
        parameter.requires_grad_(any(parameter is each for each in rows))
    if ranks.number() == 0:
        write_tensors(path, head, {"run": run})
