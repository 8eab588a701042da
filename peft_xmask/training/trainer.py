"""The Hugging Face Trainer over batches of mixed profiles."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..core.files import read_tensors, write_tensors
from ..errors import ConfigError
from ..integrations.checkpoints import check_shape, checkpoint_folder
from ..tuners.xpeft.table import MaskTable
from . import distributed as ranks
from .best_rows import BestRows
from .evaluation import Evaluator
from .sampler import ProfileBatchSampler

STATE_FILE = "profiles_training_state.safetensors"
"""Written last of a checkpoint's files: one without it was not finished, and is passed over."""


class ProfileTrainer(Trainer):
    """A Trainer whose batches come from a :class:`~peft_xmask.training.sampler.ProfileBatchSampler`.

    The loss of a batch of n examples is n / ``batch_size`` times its mean: what an example moves its profile by does
    not depend on how many others the batch has left, nor on the number of processes that it is divided among.
    """

    def __init__(self, model: nn.Module, *args: Any, batch_sampler: ProfileBatchSampler, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.batch_sampler = batch_sampler
        self.model_accepts_loss_kwargs = False  # means of batches, which the Trainer divides by the accumulation
        dense = [each for each in model.parameters() if each.requires_grad and not hasattr(each, "row_gradients")]
        if ranks.count() > 1 and not dense:
            # DDP refuses a model whose gradients are of rows alone: their optimizer exchanges them
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        for printing in (PrinterCallback, ProgressCallback):
            self.remove_callback(printing)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's loss, as far as the batch is full."""
        share = len(inputs["adapter_names"]) * ranks.count() / self.batch_sampler.batch_size
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return (found[0] * share, *found[1:]) if isinstance(found, tuple) else found * share

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches as the sampler says."""
        loader: DataLoader[Any] = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=self.batch_sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )
        if ranks.count() > 1:  # the sampler gives each process its part: it must not be divided again
            return loader
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared


class BarCallback(TrainerCallback):
    """A progress bar on standard error: steps, loss, and how many profiles have stopped."""

    def __init__(self, what: str, best: BestRows | None = None) -> None:
        self.what, self.best = what, best
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show it."""
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        timing = (TextColumn("{task.fields[facts]}"), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, *timing, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(self.what, total=state.max_steps, completed=state.global_step, facts="")
        self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move it."""
        if self._bar is None:
            return
        losses = [entry["loss"] for entry in state.log_history[-1:] if "loss" in entry]
        facts = [f"loss {losses[0]:.3f}"] if losses else []
        if self.best is not None:
            facts.append(f"{int(self.best.stopped.sum())} of {len(self.best.loss)} stopped")
        self._bar.update(self._task, completed=state.global_step, facts=", ".join(facts))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take it away."""
        if self._bar is not None:
            self._bar.stop()


class ProfilesCallback(TrainerCallback):
    """Evaluates profiles after each epoch, keeps best rows, stops profiles that got worse, and checkpoints all of it.

    Args:
        table: of the model.
        adapter_name: of the rows.
        sampler: of the batches.
        best: what it keeps.
        evaluator: None: no validation.
        run: what tells this run from others; a checkpoint says the same.
        packed: gives the masks as they are now, as they are shipped.
    """

    def __init__(
        self,
        table: MaskTable,
        adapter_name: str,
        sampler: ProfileBatchSampler,
        best: BestRows,
        evaluator: Evaluator | None,
        run: str,
        packed: Callable[[], tuple[Tensor, Tensor | None]],
    ) -> None:
        self.table, self.name, self.sampler, self.best = table, adapter_name, sampler, best
        self.evaluator, self.run, self.packed = evaluator, run, packed
        self._steps = 1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put back what a checkpoint has."""
        self._steps = -(-len(self.sampler) // args.gradient_accumulation_steps)
        if state.global_step > 0:
            self._restore(checkpoint_folder(args, state.global_step))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the sampler which epoch begins, and who has stopped."""
        self.sampler.set_epoch(state.global_step // self._steps)
        self.sampler.stopped = self.best.stopped

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """At the end of an epoch, evaluate: before a checkpoint of this step is written."""
        if self.evaluator is None or state.global_step % self._steps:
            return
        losses = self.evaluator.losses(kwargs["model"], ~self.best.stopped)
        self.best.update(losses, *self.packed(), state.global_step)
        if self.best.stopped.all():
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the training state, the last of a checkpoint's files."""
        if not args.should_save:
            return
        tensors = {f"best.{name}": tensor for name, tensor in self.best.tensors().items()}
        for name, weight in self._weights().items():
            tensors[name] = weight
        folder = checkpoint_folder(args, state.global_step)
        write_tensors(folder / STATE_FILE, tensors, {"global_step": str(state.global_step), "run": self.run})

    def _weights(self) -> dict[str, Tensor]:
        found = {"logits": self.table.xpeft_logits[self.name].weight.detach()}
        if self.name in self.table.xpeft_gain:
            found["gain"] = self.table.xpeft_gain[self.name].weight.detach()
        return found

    def _restore(self, folder: Path) -> None:
        path = folder / STATE_FILE
        tensors, _ = read_tensors(path)
        weights = self._weights()
        stored = {name: check_shape(self.name, weight, tensors.get(name), path) for name, weight in weights.items()}
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(stored[name])
        self.best.load({name.removeprefix("best."): tensor for name, tensor in tensors.items() if "best." in name})
        self.table.rebuilt.discard(self.name)


def last_checkpoint(folder: Path, run: str) -> Path | None:
    """The last finished checkpoint of a run; None if there is none.

    Raises:
        ConfigError: there are checkpoints, of another run.
    """
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda each: int(each.name.removeprefix("checkpoint-")), reverse=True):
        if not (path / STATE_FILE).is_file():
            continue
        _, metadata = read_tensors(path / STATE_FILE)
        if metadata.get("run") != run:
            raise ConfigError(
                f"Expected a checkpoint of this run in '{folder}', found one with other profiles or settings: "
                f"{_difference(metadata.get('run', '{}'), run)}. Train with resume=False, or in another output_dir."
            )
        return path
    return None


def _difference(found: str, expected: str) -> str:
    there, here = json.loads(found), json.loads(expected)
    return ", ".join(f"{key}={there.get(key)!r} (not {here[key]!r})" for key in here if there.get(key) != here[key])
