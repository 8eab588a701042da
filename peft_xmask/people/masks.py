"""Training of everybody's masks, and of the pool that they choose from: what runs of all tasks have in common."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from transformers import PreTrainedModel, TrainingArguments

from ..errors import ConfigError, PeftXMaskError
from ..pool import AdapterPool
from ..training.fit_pool import fit_pool
from ..training.pool_settings import PoolFitting
from ..training.train import train_profiles
from ..training.trained_bank import TrainedBank
from ..tuners.bottleneck import BottleneckConfig
from ..tuners.xpeft import XPEFTConfig
from .examples import PeopleExamples
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


def fit_directions(
    model: PreTrainedModel,
    examples: PeopleExamples,
    task_type: str,
    settings: PersonalizeSettings,
    how: Execution,
    **changes: Any,
) -> AdapterPool:
    """A pool fitted to these people: what they share, and the directions in which those with most examples differ.

    Args:
        model: the base with a head; it is not modified.
        examples: of the people.
        task_type: PEFT's.
        settings: of the profiles.
        how: of the run.
        changes: further fields of :class:`~peft_xmask.training.pool_settings.PoolFitting`.

    Raises:
        ConfigError: fewer than two people have examples to learn from.
    """
    width: dict[str, Any] = {"bottleneck_size": settings.bottleneck_size, "task_type": task_type}
    counts = sorted(examples.labels.values())
    args = TrainingArguments(
        output_dir=str(how.folder), per_device_train_batch_size=settings.batch_size, per_device_eval_batch_size=64,
        num_train_epochs=settings.common_epochs, learning_rate=1e-3, save_strategy="epoch", save_total_limit=2,
        seed=settings.seed, report_to=[], use_cpu=not torch.cuda.is_available(), logging_strategy="no",
    )  # fmt: skip
    found = fit_pool(
        model,
        examples.rows["train"],
        PoolFitting(
            config=BottleneckConfig(**width, **last_blocks(model, settings.layers)),
            args=args,
            size=settings.num_adapters,
            min_examples=max(settings.min_labels, min(PoolFitting.min_examples, counts[-2] if len(counts) > 1 else 1)),
            group_steps=settings.group_steps,
            group_head="shared",
        ),
        validation=examples.rows["validation"] or None,
        resume=how.resume,
        progress=how.progress,
        **changes,
    )
    found.pool.save_pretrained(how.folder / "pool")
    return found.pool


def mask_config(model: PreTrainedModel, task_type: str, settings: PersonalizeSettings, how: Execution) -> XPEFTConfig:
    """The adapter of all people: a random pool in the last blocks, or the given pool where it belongs."""
    if how.pool is not None:
        return XPEFTConfig(task_type=task_type, learn_gain=True, pool=how.pool)
    chosen: dict[str, Any] = {"num_adapters": settings.num_adapters, "bottleneck_size": settings.bottleneck_size}
    return XPEFTConfig(task_type=task_type, learn_gain=True, **chosen, **last_blocks(model, settings.layers))


def last_blocks(model: PreTrainedModel, layers: int | None) -> dict[str, Any]:
    """``layers_to_transform`` of a config that adapts the last blocks; empty: all."""
    blocks = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if layers is None or blocks is None:
        return {}
    return {"layers_to_transform": list(range(max(0, blocks - layers), blocks))}


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
