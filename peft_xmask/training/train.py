"""Training very many profiles in one run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from ..bank.bank import ProfileBank
from . import distributed as ranks
from .common import with_common_part
from .data import ProfileData
from .fleet import FleetRun, RayFleet
from .run import TrainingRun
from .settings import ProfileTraining
from .trained_bank import TrainedBank, write_metrics


def train_profiles(
    model: nn.Module,
    dataset: Any,
    settings: ProfileTraining | None = None,
    *,
    validation: Any = None,
    bank: ProfileBank | None = None,
    ray: RayFleet | int | None = None,
    resume: bool = False,
    progress: bool = True,
    **changes: Any,
) -> TrainedBank:
    """Train all profiles of a dataset in one run of the Trainer, each batch a mix of them, and return them as a bank.

    A step changes only the rows of the profiles in its batch (:class:`~peft_xmask.training.row_adamw.RowAdamW`). Only
    the profiles of the dataset have rows: the other profiles of ``bank`` cost nothing and keep every bit.

    After each epoch every profile with validation examples is evaluated. Its best row is kept, and after ``patience``
    evaluations without improvement it stops: its examples leave the batches, and the other profiles train as if it were
    still there. A profile whose best row is no better than the model without it gets gains of zero. A profile without
    validation examples keeps its last row.

    Under ``accelerate launch`` or ``torchrun`` the processes train together: each has its part of every batch, all have
    the same rows, bit for bit, and all get the bank; the first one writes the files. With ``ray`` the profiles are
    divided into shards, and each worker trains one shard after another.

    Args:
        model: a base, which is adapted in place as by ``get_peft_model``; or a PeftModel whose active adapter is an
            X-PEFT adapter with one row for each profile, in the order in which they first appear in the dataset.
        dataset: tokenised examples with labels and a column of profile names: a ``datasets.Dataset``, or anything with
            a length and examples by number. Names are strings or whole numbers.
        settings: how to train; None: the defaults.
        validation: examples of the same profiles. None: no profile stops early, and the last rows are kept.
        bank: an existing bank, which the profiles join; those that it already has continue from their masks. ``bank``
            is not modified: the result contains its profiles too.
        ray: a :class:`~peft_xmask.training.fleet.RayFleet`, or a number of workers on this machine. ``head`` must then
            be ``"frozen"`` or ``"first"``, ``args`` is required, its ``output_dir`` must be a folder that all workers
            reach, and ``model`` is not modified. The bank is also written to ``output_dir/bank``.
        resume: continue from the last finished checkpoint in ``args.output_dir``, if there is one. The bank is then the
            same, byte for byte, as that of an uninterrupted run.
        progress: whether to show a progress bar.
        changes: fields of :class:`~peft_xmask.training.settings.ProfileTraining` to change in ``settings``, as a
            shortcut: ``train_profiles(model, data, head="frozen")``.

    Returns:
        The bank, with ``metrics``, which are also written to ``metrics.json`` in ``args.output_dir``.

    Raises:
        ConfigError: invalid settings; a dataset without examples or the column; invalid names; validation examples of
            other profiles; checkpoints of another run, that is, one with other data, settings or adapter; or processes
            that differ in any of these. All are raised before training starts.
        BaseMismatchError, PoolMismatchError: the bank belongs to another base or pool.
        MissingExtraError: ``ray=`` without Ray installed.
        FleetError: a shard failed more often than it may be retried.

    Source: X-PEFT (arXiv 2401.16137) for the profiles; training them together is ours.
    """
    settings = ProfileTraining.of(settings, changes)
    data = ProfileData.of(dataset, validation, settings.profile_column)
    fleet = None if ray is None else RayFleet.of(ray, settings, bank)
    with tempfile.TemporaryDirectory() as beside:
        settings = settings.resolved(joins_bank=bank is not None, folder=beside)
        if settings.common_size:
            model, settings = with_common_part(model, data, settings, progress=progress)
        if fleet is None:
            trained = TrainingRun.prepare(model, data, settings, bank, progress=progress).train(resume)
        else:
            trained = FleetRun(fleet, model, data, settings, bank).train(resume, progress)
        if ranks.number() == 0:
            write_metrics(trained.metrics, Path(str(settings.trainer.output_dir)))
        return trained if bank is None else trained.joined_to(bank)
