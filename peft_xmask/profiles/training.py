"""Training very many profiles at once."""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, TrainingArguments, default_data_collator

from ..errors import ConfigError
from ..files import write_text
from ..xpeft import XPEFTConfig
from .bank import ProfileBank
from .best_rows import BestRows
from .collator import ProfileCollator
from .columns import profiles_of, rows_of
from .evaluation import Evaluator, ExampleLoss, example_losses
from .joint import JointRun, with_rows
from .names import NameIndex
from .profile_trainer import last_checkpoint
from .sampler import ProfileBatchSampler

HEADS = ("joint", "frozen", "first")
METRICS_FILE = "metrics.json"


class TrainedBank(ProfileBank):
    """A bank that was just trained.

    Attributes:
        metrics: of each profile that was trained: ``examples`` and ``validation_examples`` (counts),
            ``validation_loss`` of the row that was kept, ``best_step`` it is from and ``stopped_step`` (steps of the
            optimizer); None where there is none, as without validation examples.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.metrics: dict[str, dict[str, float | int | None]] = {}


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
    resume: bool = False,
    progress: bool = True,
) -> TrainedBank:
    """Train all profiles of a dataset in one run of the Trainer, each batch a mix of them, and give them as a bank.

    Only the rows of a step's profiles move in it (:class:`~peft_xmask.profiles.row_adamw.RowAdamW`). Rows exist for the
    profiles of the dataset and no others: what a bank holds besides them costs nothing here and keeps every bit.

    An epoch draws ``d_u = min(N n_u^(1/T) / sum_v n_v^(1/T), max_passes n_u)`` examples of a profile that has n_u of N
    (:func:`~peft_xmask.profiles.sampler.draws_per_epoch`). After each epoch every profile with validation examples is
    evaluated; its best row is kept, and after ``patience`` evaluations without a better one its examples leave the
    batches, the others' being what they would have been. A profile without validation examples has its last row.

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
            :func:`~peft_xmask.profiles.evaluation.example_losses`.
        resume: go on from the last finished checkpoint in ``args.output_dir``, if there is one. With the same data and
            settings the bank is, byte for byte, that of a run that was not interrupted.
        progress: whether to show a bar.

    Returns:
        The bank, with ``metrics``; these are also written to ``args.output_dir``, in ``metrics.json``.

    Raises:
        ConfigError: a setting that cannot be; a dataset without examples or the column; names that are missing or
            cannot be; validation examples of other profiles; a checkpoint of another run. All before anything is
            computed.
        BaseMismatchError, PoolMismatchError: the bank is of another base or pool.

    Source: X-PEFT (arXiv 2401.16137) for the profiles; training them together is ours.
    """
    names = profiles_of(dataset, profile_column)
    index = NameIndex.build(dict.fromkeys(names))
    rows = rows_of(names, index.find, "training")
    held_out = None
    if validation is not None:
        held_out = rows_of(profiles_of(validation, profile_column), index.find, "validation")
    head = _chosen_head(head, bank)
    if bank is not None and config is not None:
        raise ConfigError("Expected config= or bank=, found both: profiles that join a bank have its config.")
    with tempfile.TemporaryDirectory() as beside:
        args = _arguments(args, beside)
        settings: dict[str, Any] = {
            "profiles": _digest(names), "validation": None if held_out is None else _digest(held_out.tolist()),
            "head": head, "head_epochs": head_epochs, "epochs": args.num_train_epochs,
            "batch_size": args.train_batch_size,
            "accumulation": args.gradient_accumulation_steps, "learning_rate": args.learning_rate,
            "head_learning_rate": head_learning_rate or args.learning_rate, "mask_learning_rate": mask_learning_rate,
            "temperature": temperature, "max_passes": max_passes, "patience": patience, "seed": args.seed,
        }  # fmt: skip
        _check_numbers(settings)
        sampler = ProfileBatchSampler(
            rows, args.train_batch_size, temperature=temperature, max_passes=max_passes, seed=args.seed
        )
        adapted, name = with_rows(model, config, bank, index, logit_scale=mask_learning_rate / args.learning_rate)
        if data_collator is None:
            data_collator = DataCollatorWithPadding(processing_class) if processing_class else default_data_collator
        collator = ProfileCollator(data_collator, index, column=profile_column, model=adapted)
        settings["adapter"] = _digest(adapted.peft_config[name].to_dict())
        run = JointRun(adapted, name, index, dataset, collator, sampler, args, settings, progress)
        checkpoint = last_checkpoint(Path(str(args.output_dir)), run.run) if resume else None
        for parameter in run.head().values():
            parameter.requires_grad_(head == "joint")
        if head == "first":
            run.train_head(head_epochs, settings["head_learning_rate"])
        evaluator = None
        if held_out is not None:
            causal = getattr(adapted.peft_config[name], "task_type", None) == "CAUSAL_LM"
            loss = example_loss or partial(example_losses, causal=causal)
            evaluator = Evaluator(validation, held_out, len(index), collator, args.per_device_eval_batch_size, loss)
        best = run.train(evaluator, patience, settings["head_learning_rate"], checkpoint)
        trained = _choose(run, best, evaluator)
        _write_metrics(trained, Path(str(args.output_dir)))
        return trained if bank is None else _joined(bank, trained)


def _chosen_head(head: str | None, bank: ProfileBank | None) -> str:
    chosen = head or ("joint" if bank is None else "frozen")
    if chosen not in HEADS:
        raise ConfigError(f"head={head!r} is not possible. Expected one of {', '.join(map(repr, HEADS))}.")
    if bank is not None and chosen != "frozen":
        raise ConfigError(
            f"head={head!r} is not possible with bank=: its profiles are served with the bank's head, which stays as "
            "it is. Pass head='frozen', or train a bank of its own."
        )
    return chosen


def _arguments(args: TrainingArguments | None, beside: str) -> TrainingArguments:
    if args is None:
        args = TrainingArguments(
            output_dir=beside, per_device_train_batch_size=32, num_train_epochs=10, learning_rate=1e-2,
            save_strategy="no", report_to=[],
        )  # fmt: skip
    if args.world_size > 1:
        raise ConfigError(
            f"Expected one process, found {args.world_size}. Train with the Trainer and a ProfileCollator, or train "
            "parts of the profiles in each process and merge the banks."
        )
    if args.fp16:
        raise ConfigError("fp16=True is not possible: gradients of rows are not scaled. Expected float32 or bf16=True.")
    args = copy.copy(args)
    args.remove_unused_columns, args.max_steps = False, -1
    args.eval_strategy, args.load_best_model_at_end, args.eval_on_start = "no", False, False  # type: ignore[assignment]
    args.disable_tqdm, args.push_to_hub = True, False
    if args.save_total_limit is not None:
        args.save_total_limit = max(2, args.save_total_limit)
    return args


def _digest(facts: Any) -> str:
    encoded = json.dumps(
        facts, sort_keys=True, default=lambda value: sorted(value) if isinstance(value, set) else str(value)
    )
    return hashlib.sha256(encoded.encode()).hexdigest()[:16]


def _check_numbers(settings: dict[str, Any]) -> None:
    for name in ("learning_rate", "head_learning_rate", "mask_learning_rate", "head_epochs"):
        if not settings[name] > 0:
            raise ConfigError(f"{name}={settings[name]!r} is not possible. Expected a number above 0.")
    if settings["patience"] is not None and settings["patience"] < 1:
        raise ConfigError(
            f"patience={settings['patience']!r} is not possible. Expected at least one evaluation, or None."
        )


def _choose(run: JointRun, best: BestRows, evaluator: Evaluator | None) -> TrainedBank:
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
    facts = ("profiles", "head", "epochs", "batch_size", "learning_rate", "mask_learning_rate", "temperature", "seed")
    config.training = {**{name: run.settings[name] for name in facts}, "profiles": len(bits)}
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


def _joined(bank: ProfileBank, trained: TrainedBank) -> TrainedBank:
    """The bank with the profiles that were trained; itself, it stays as it is."""
    content = bank.content()
    assert content.names is not None
    joined = TrainedBank(bank.config, content.bits, content.gain_bits, content.names, content.shared)
    for name in trained:
        joined.add(name, trained[name])
    joined.metrics = trained.metrics
    return joined


def _write_metrics(trained: TrainedBank, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / METRICS_FILE, json.dumps(trained.metrics, ensure_ascii=False, indent=1))
