"""Fitting a pool to the people or tasks of a dataset."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from .._version import __version__
from ..core.hub import shown_name
from ..pool import AdapterPool
from ..pool.fitted import fitted_pool
from .data import ProfileData
from .groups import Group, groups_of, without
from .grow import Grower, State
from .pool_settings import PoolFitting

FOLDER = "fitting"
"""In ``output_dir``: what is finished of a run."""
_TOLD = (
    "group_head", "group_steps", "group_learning_rate", "learning_rate", "head_learning_rate", "epochs", "max_steps",
    "batch_size", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class FittedPool:
    """A pool, and the head that was trained with its common part.

    Attributes:
        pool: with a common part, directions around it, and what it was fitted to.
        head: parameters of the head that was trained with the common adapter, by their name in the base. Empty without
            one, and where groups had heads of their own, since a new task will have its own too.
        groups: names of the people or tasks whose deviations the directions come from.
    """

    pool: AdapterPool
    head: dict[str, Tensor]
    groups: tuple[str, ...]


def fit_pool(
    model: nn.Module,
    dataset: Any,
    settings: PoolFitting | None = None,
    *,
    validation: Any = None,
    resume: bool = False,
    progress: bool = True,
    **changes: Any,
) -> FittedPool:
    """Fit a pool to the people or tasks of a dataset: what they share, and the directions in which they differ.

    1. One adapter is trained on all examples, with the head: the common part. Of its epochs, the one with the smallest
       validation loss is kept.
    2. From there, one adapter is trained for each of up to ``max_groups`` people or tasks, for ``group_steps``.
    3. The mean of these is the pool's common part. Of the deviations from it, ``principal`` principal directions are
       kept at each site, each as long as the groups' standard deviation along it; the pool's ``size`` directions are
       random mixtures of them (:mod:`peft_xmask.pool.directions`).

    Profiles over the pool start exactly at the common part, and masks with a gain of 1 reach about as far as the groups
    deviate.

    Under ``accelerate launch`` or ``torchrun`` the processes train every adapter together, by DDP, and get the same
    pool; the first one writes the files.

    Args:
        model: a base, with the head of the data's labels. It is not modified.
        dataset: tokenised examples with labels and a column of names of people or tasks, as of
            :func:`~peft_xmask.train_profiles`.
        settings: how to fit; None: the defaults.
        validation: examples by which the common part's best epoch is chosen. None: the last one.
        resume: continue an interrupted run from what is finished in ``args.output_dir/fitting``; the pool is the same,
            byte for byte.
        progress: whether to show progress bars.
        changes: fields of :class:`~peft_xmask.training.pool_settings.PoolFitting` to change in ``settings``.

    Returns:
        The pool, not saved yet, and the head.

    Raises:
        ConfigError: invalid settings; a dataset without examples or the column; fewer than two people or tasks with
            enough examples; files of another run in the folder; or processes that differ in any of these.

    Source: a common adapter and principal directions of deviations, ours. Kin: Reptile (arXiv 1803.02999) for the mean
    of adapters that start at one point.
    """
    settings = PoolFitting.of(settings, changes)
    with tempfile.TemporaryDirectory() as beside:
        settings = settings.resolved(beside)
        dataset = without(dataset, settings.held_out, settings.profile_column)
        data = ProfileData.of(dataset, None, settings.profile_column)
        folder = Path(str(settings.trainer.output_dir)) / FOLDER
        digests = {**data.fingerprint, **_validation_of(validation)}
        groups = groups_of(data, settings, int(getattr(getattr(model, "config", None), "num_labels", 0)))
        grower = Grower(model, settings, folder, digests, resume=resume, progress=progress)
        common = grower.grow_common(dataset, validation)
        states = [
            grower.grow(group, dataset, common, f"group {number} of {len(groups)}")
            for number, group in enumerate(groups, 1)
        ]
        adapters = [grower.adapter(state, group.name) for state, group in zip(states, groups, strict=True)]
    facts = _facts(model, data, settings, groups)
    principal = min(settings.principal, settings.size // 2 - 1)
    pool = fitted_pool(adapters, settings.size, principal, settings.trainer.seed, facts)
    head = {} if groups[0].classes is not None else _head_of(common)
    return FittedPool(pool, head, tuple(group.name for group in groups))


def _validation_of(validation: Any) -> dict[str, str | None]:
    from ..core.examples import fingerprint_examples

    return {"validation": None if validation is None else fingerprint_examples(validation)}


def _facts(model: nn.Module, data: ProfileData, settings: PoolFitting, groups: list[Group]) -> dict[str, Any]:
    """What the pool's card says. No names of people, no paths, no dates."""
    identity = settings.identity()
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or type(model).__name__
    own = groups[0].classes is not None
    return {
        "data": settings.data_name or "not recorded",
        "base": shown_name(base),
        "column": data.column,
        "examples": len(data.rows),
        "people or tasks": len(data.index),
        "held out": len(settings.held_out),
        "groups": len(groups),
        "examples of groups": sum(len(group.places) for group in groups),
        **{name: identity[name] for name in _TOLD},
        "group_head": "own" if own else "shared",
        "peft_xmask": __version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def _head_of(state: State) -> dict[str, Tensor]:
    marks = (".modules_to_save.default.", "base_model.model.")
    return {
        name.replace(marks[0], ".").removeprefix(marks[1]): tensor for name, tensor in state.items() if marks[0] in name
    }
