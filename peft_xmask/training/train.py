"""Training very many profiles at once."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, TrainingArguments, default_data_collator, set_seed

from ..bank.bank import ProfileBank
from ..bank.names import NameIndex
from ..tuners.xpeft import XPEFTConfig
from . import distributed as ranks
from .best_rows import BestRows
from .collator import ProfileCollator
from .data import ProfileData
from .evaluation import Evaluator, ExampleLoss, example_losses
from .fleet import FleetRun, RayFleet
from .run import JointRun, with_rows
from .sampler import ProfileBatchSampler
from .settings import Recipe, arguments, digest
from .trained_bank import TrainedBank, joined, write_metrics
from .trainer import last_checkpoint


def train_profiles(
    model: nn.Module,
    dataset: Any,
    *,
    profile_column: str = "user",
    validation: Any = None,
    config: XPEFTConfig | None = None,
    bank: ProfileBank | None = None,
    args: TrainingArguments | None = None,
    processing_class: Any = None,
    data_collator: Callable[[list[dict[str, Any]]], Any] | None = None,
    head: str | None = None,
    head_learning_rate: float | None = None,
    head_epochs: int = 1,
    mask_learning_rate: float = 0.1,
    temperature: float = 2.0,
    max_passes: float = 4.0,
    patience: int | None = 3,
    example_loss: ExampleLoss | None = None,
    ray: RayFleet | int | None = None,
    resume: bool = False,
    progress: bool = True,
) -> TrainedBank:
    """Train all profiles of a dataset in one run of the Trainer, each batch a mix of them, and give them as a bank.

    Only the rows of a step's profiles move in it (:class:`~peft_xmask.training.row_adamw.RowAdamW`). Rows exist for the
    profiles of the dataset and no others: what a bank holds besides them costs nothing here and keeps every bit.

    An epoch draws ``d_u = min(N n_u^(1/T) / sum_v n_v^(1/T), max_passes n_u)`` examples of a profile that has n_u of N
    (:func:`~peft_xmask.training.sampler.draws_per_epoch`). After each epoch every profile with validation examples is
    evaluated; its best row is kept, and after ``patience`` evaluations without a better one its examples leave the
    batches, the others' being what they would have been. A profile without validation examples has its last row.

    Under ``accelerate launch`` or ``torchrun`` the processes train together: each has its part of every batch, all have
    the same rows, bit for bit, and all get the bank; the first writes the files. With ``ray`` the profiles are divided
    into shards, and each worker trains one after another of them as this function does it.

    Args:
        model: the base, which is adapted in place as by ``get_peft_model``; or a PeftModel whose active adapter is an
            X-PEFT adapter with one row for each profile of the dataset, in the order in which they first come.
        dataset: examples as the Trainer takes them (a ``datasets.Dataset``, or anything with a length and examples by
            number), tokenised, with labels and ``profile_column``.
        profile_column: the name of each example's profile, a string.
        validation: examples of the same profiles. None: no profile stops, and the last rows are kept.
        config: of the adapter, when ``model`` is a base. None: ``bank``'s, or ``XPEFTConfig(task_type="SEQ_CLS")``.
            Its ``num_profiles`` and ``logit_scale`` are set here.
        bank: an existing bank, which the profiles join. Those it already has go on from its masks. It is not changed:
            the result holds its profiles too.
        args: of the Trainer. None: 10 epochs of batches of 32, learning rate 1e-2, nothing saved. ``max_steps`` and
            what it says of evaluation are not used, ``max_grad_norm`` is that of the head, and at least two checkpoints
            are kept.
        processing_class: a tokenizer, for padding, as of the Trainer.
        data_collator: of everything but the profiles; None: padding with ``processing_class``, or none.
        head: ``"joint"``: the head that all profiles share is trained with them (a row is then chosen under the last
            head); ``"frozen"``: it stays as the model has it; ``"first"``: it is trained alone first, with no adapter,
            for ``head_epochs``, and then frozen. None: ``"joint"``, or ``"frozen"`` with ``bank``.
        head_learning_rate: of the head; None: that of ``args``.
        head_epochs: of ``"first"``.
        mask_learning_rate: of the logits, by ``logit_scale``.
        temperature: T. 1: every example once an epoch; higher: profiles with few examples get more passes.
        max_passes: over an example in one epoch.
        patience: evaluations without improvement before a profile stops; None: no profile stops.
        example_loss: a loss for each example, from a model's outputs and the batch; None:
            :func:`~peft_xmask.training.evaluation.example_losses`.
        ray: a :class:`~peft_xmask.training.fleet.RayFleet`, or the number of workers of one on this machine; None: no
            workers. Then ``head`` is ``"frozen"`` or ``"first"``, ``args`` is needed, its ``output_dir`` is a folder
            that all workers reach and gets the bank too, in ``bank``, and ``model`` stays as it is.
        resume: go on from the last finished checkpoint in ``args.output_dir``, if there is one. With the same data and
            settings the bank is, byte for byte, that of a run that was not interrupted.
        progress: whether to show a bar.

    Returns:
        The bank, with ``metrics``; these are also written to ``args.output_dir``, in ``metrics.json``.

    Raises:
        ConfigError: a setting that cannot be; a dataset without examples or the column; names that are missing or
            cannot be; validation examples of other profiles; a checkpoint of another run; processes that do not have
            the same. All before anything is computed.
        BaseMismatchError, PoolMismatchError: the bank is of another base or pool.
        MissingExtraError: ``ray=``, and Ray is not installed.
        FleetError: a shard failed more often than it may be tried again.

    Source: X-PEFT (arXiv 2401.16137) for the profiles; training them together is ours.
    """
    data = ProfileData.of(dataset, validation, profile_column)
    fleet = None if ray is None else RayFleet.of(ray, args, head, bank)
    with tempfile.TemporaryDirectory() as beside:
        args = arguments(args, beside)
        if data_collator is None:
            data_collator = DataCollatorWithPadding(processing_class) if processing_class else default_data_collator
        recipe = Recipe(
            args=args,
            config=config,
            bank=bank,
            data_collator=data_collator,
            head=head or ("joint" if bank is None else "frozen"),
            head_learning_rate=head_learning_rate or args.learning_rate,
            head_epochs=head_epochs,
            mask_learning_rate=mask_learning_rate,
            temperature=temperature,
            max_passes=max_passes,
            patience=patience,
            example_loss=example_loss,
        )
        sampler = ProfileBatchSampler(
            data.rows,
            recipe.batch_size,
            temperature=temperature,
            max_passes=max_passes,
            seed=args.seed,
            part=(ranks.number(), ranks.count()),
        )
        if fleet is None:
            trained = _train_here(_run(model, data, recipe, sampler, progress), data, recipe, resume)
        else:
            plan = FleetRun(fleet, model, data, recipe)
            plan.check(resume)
            head_of = _head_alone(model, data, recipe, sampler, progress) if recipe.head == "first" else bank
            trained = plan.train(head_of, progress)
        if ranks.number() == 0:
            write_metrics(trained.metrics, Path(str(args.output_dir)))
        return trained if bank is None else joined(bank, trained)


def _run(
    model: nn.Module,
    data: ProfileData,
    recipe: Recipe,
    sampler: ProfileBatchSampler,
    progress: bool,
    index: NameIndex | None = None,
) -> JointRun:
    """The model with a row for each profile, or each of an index, and what it is trained on."""
    set_seed(recipe.args.seed)  # one row alone starts by chance
    index = data.index if index is None else index
    scale = recipe.mask_learning_rate / recipe.args.learning_rate
    adapted, name = with_rows(model, recipe.config, recipe.bank, index, logit_scale=scale)
    collator = ProfileCollator(recipe.data_collator, data.index, column=data.column, model=adapted)
    settings = {**recipe.settings(data), "adapter": digest(adapted.peft_config[name].to_dict())}
    run = JointRun(adapted, name, index, data.dataset, collator, sampler, recipe.args, settings, progress)
    ranks.require_same(run.run, recipe.args.device)
    ranks.send_from_first(run.head().values(), recipe.args.device)
    return run


def _train_here(run: JointRun, data: ProfileData, recipe: Recipe, resume: bool) -> TrainedBank:
    """Train in this process, and those that train with it."""
    checkpoint = last_checkpoint(Path(str(run.args.output_dir)), run.run) if resume else None
    for parameter in run.head().values():
        parameter.requires_grad_(recipe.head == "joint")
    if recipe.head == "first":
        run.train_head(recipe.head_epochs, recipe.head_learning_rate)
    evaluator = None
    if data.held_out is not None:
        causal = getattr(run.model.peft_config[run.name], "task_type", None) == "CAUSAL_LM"
        loss = recipe.example_loss or partial(example_losses, causal=causal)
        size = run.args.per_device_eval_batch_size
        evaluator = Evaluator(data.validation, data.held_out, len(data.index), run.collator, size, loss)
    best = run.train(evaluator, recipe.patience, recipe.head_learning_rate, checkpoint)
    return _choose(run, best, evaluator, recipe.told(data))


def _head_alone(
    model: nn.Module, data: ProfileData, recipe: Recipe, sampler: ProfileBatchSampler, progress: bool
) -> ProfileBank:
    """A bank without profiles whose head was trained on the base alone, for shards whose profiles join it."""
    one = NameIndex.build([data.index.name(0)])
    run = _run(copy.deepcopy(model), data, recipe, sampler, progress, index=one)
    run.train_head(recipe.head_epochs, recipe.head_learning_rate)
    return ProfileBank.from_model(run.model, list(one)).select([])


def _choose(run: JointRun, best: BestRows, evaluator: Evaluator | None, told: dict[str, Any]) -> TrainedBank:
    """A bank of the best rows, and of the last ones of profiles without validation examples."""
    bits, gain_bits = run.packed()
    chosen, losses = best.loss.isfinite(), best.loss.clone()
    if evaluator is not None and run.settings["head"] == "joint":  # the best were found with earlier heads
        last = evaluator.losses(run.model)
        merged = _merged(chosen, best, bits, gain_bits)
        run.table.load(run.name, *merged)
        losses = evaluator.losses(run.model)
        chosen = chosen & (losses <= last)
        losses = torch.where(chosen, losses, last)
    bits, gain_bits = _merged(chosen, best, bits, gain_bits)
    config: Any = run.model.peft_config[run.name]
    config.training = told
    found = ProfileBank.from_model(run.model, list(run.index))
    trained = TrainedBank(found.config, bits, gain_bits, run.index, found.shared)
    judged = losses.isfinite()
    counts = torch.bincount(run.sampler.rows, minlength=len(bits))
    held_out = torch.zeros_like(counts) if evaluator is None else evaluator.counts
    for row, name in enumerate(run.index):
        trained.metrics[name] = {
            "examples": int(counts[row]),
            "validation_examples": int(held_out[row]),
            "validation_loss": float(losses[row]) if judged[row] else None,
            "best_step": int(best.step[row]) if chosen[row] else None,
            "stopped_step": int(best.stopped_at[row]) if best.stopped[row] else None,
        }
    return trained


def _merged(chosen: Tensor, best: BestRows, bits: Tensor, gain_bits: Tensor | None) -> tuple[Tensor, Tensor | None]:
    bits = torch.where(chosen.view(-1, 1, 1, 1), best.bits, bits)
    if gain_bits is not None and best.gain_bits is not None:
        gain_bits = torch.where(chosen.view(-1, 1, 1), best.gain_bits, gain_bits)
    return bits, gain_bits
