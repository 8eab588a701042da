"""Training of everybody's masks: what runs of all tasks have in common."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from transformers import PreTrainedModel, TrainingArguments

from ..errors import ConfigError, PeftXMaskError
from ..pool import AdapterPool
from ..training.train import train_profiles
from ..training.trained_bank import TrainedBank
from ..tuners.xpeft import XPEFTConfig
from .settings import Execution, PersonalizeSettings


def train_masks(
    model: PreTrainedModel,
    examples: Any,
    validation: Any,
    task_type: str,
    settings: PersonalizeSettings,
    how: Execution,
    **changes: Any,
) -> TrainedBank:
    """A row of masks for each person of the examples, over the pool that the run has.

    Args:
        model: the base; it is adapted in place.
        examples: tokenised examples with labels and ``user``.
        validation: the same of other examples; empty: none.
        task_type: PEFT's.
        settings: of the profiles.
        how: of the run.
        changes: further fields of :class:`~peft_xmask.training.settings.ProfileTraining`.
    """
    args = TrainingArguments(
        output_dir=str(how.folder), per_device_train_batch_size=settings.batch_size, per_device_eval_batch_size=64,
        num_train_epochs=max(settings.epochs, 0.01), learning_rate=1e-2, save_strategy="epoch", save_total_limit=2,
        seed=settings.seed, report_to=[], use_cpu=not torch.cuda.is_available(), logging_strategy="no",
    )  # fmt: skip
    return train_profiles(
        model,
        examples,
        validation=validation or None,
        config=mask_config(model, task_type, settings, how),
        args=args,
        mask_learning_rate=settings.mask_learning_rate,
        patience=settings.patience,
        ray=how.ray,
        resume=how.resume,
        progress=how.progress,
        **changes,
    )


def mask_config(model: PreTrainedModel, task_type: str, settings: PersonalizeSettings, how: Execution) -> XPEFTConfig:
    """The adapter of all people: a random pool in the last blocks, or the given pool where it belongs."""
    if how.pool is not None:
        return XPEFTConfig(task_type=task_type, learn_gain=True, pool=how.pool)
    chosen: dict[str, Any] = {"num_adapters": settings.num_adapters, "bottleneck_size": settings.bottleneck_size}
    blocks = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if settings.layers is not None and blocks is not None:
        chosen["layers_to_transform"] = list(range(max(0, blocks - settings.layers), blocks))
    return XPEFTConfig(task_type=task_type, learn_gain=True, **chosen)


def check_pool(pool: AdapterPool, model: PreTrainedModel, base: str) -> None:
    """Refuse a pool that does not fit the base, before anything is trained. The model stays as it is.

    Raises:
        ConfigError: the base lacks the modules that the pool's adapters sit on, or they have other widths.
    """
    try:
        adapted: Any = get_peft_model(model, XPEFTConfig(pool=pool, num_profiles=1))
    except (ValueError, RuntimeError, PeftXMaskError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"The pool '{pool.name_or_path}' does not fit the base '{base}': {reason[:300]} Pass a pool that was made "
            "on this base, or none for a random one."
        ) from error
    adapted.unload()
