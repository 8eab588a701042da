"""The Hugging Face Trainer over batches of mixed profiles."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
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
from ..core.progress import ProgressBar
from ..integrations.checkpoints import check_shape, checkpoint_folder
from . import distributed as ranks
from .best_rows import BestRows
from .checkpoints import STATE_FILE
from .evaluation import Evaluator
from .profile_model import ProfileModel
from .sampler import ProfileBatchSampler


class ProfileTrainer(Trainer):
    """A Trainer whose batches come from a :class:`~peft_xmask.training.sampler.ProfileBatchSampler`.

    The loss of a batch of n examples is n / ``batch_size`` times its mean: what an example moves its profile by does
    not depend on how many others the batch has left, nor on the number of processes that it is divided among.

    Args:
        batch_sampler: of the batches.
        prior: called with the rows of a batch's examples, ``[n]``; what it gives, ``[n]``, is added to their losses.
    """

    def __init__(
        self,
        model: nn.Module,
        *args: Any,
        batch_sampler: ProfileBatchSampler,
        prior: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, *args, **kwargs)
        self.batch_sampler, self.prior = batch_sampler, prior
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
        loss, *outputs = found if isinstance(found, tuple) else (found,)
        if self.prior is not None:
            loss = loss + self.prior(inputs["adapter_names"]).mean()
        return (loss * share, *outputs) if outputs else loss * share

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
    """A progress bar: steps, loss, and how many profiles have stopped."""

    def __init__(self, title: str, best: BestRows | None = None) -> None:
        self.title, self.best = title, best
        self._bar: ProgressBar | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        self._bar = ProgressBar(self.title, state.max_steps, done=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is None:
            return
        facts = [f"loss {entry['loss']:.3f}" for entry in state.log_history[-1:] if "loss" in entry]
        if self.best is not None:
            facts.append(f"{int(self.best.stopped.sum())} of {len(self.best.loss)} stopped")
        self._bar.move_to(state.global_step, ", ".join(facts))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()


class ProfilesCallback(TrainerCallback):
    """Evaluates profiles after each epoch, keeps their best rows, stops those that no longer improve, and checkpoints.

    Args:
        profiles: the model that is trained.
        sampler: of the batches.
        best: the rows that are kept.
        evaluator: None without validation examples.
        run: identity of the run, written to its checkpoints.
    """

    def __init__(
        self,
        profiles: ProfileModel,
        sampler: ProfileBatchSampler,
        best: BestRows,
        evaluator: Evaluator | None,
        run: str,
    ) -> None:
        self.profiles, self.sampler, self.best, self.evaluator, self.run = profiles, sampler, best, evaluator, run
        self._steps = 1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the state of a checkpoint."""
        self._steps = -(-len(self.sampler) // args.gradient_accumulation_steps)
        if state.global_step == 0:
            return
        path = checkpoint_folder(args, state.global_step) / STATE_FILE
        tensors, _ = read_tensors(path)
        for name, weight in self.profiles.weights().items():
            check_shape(self.profiles.adapter, weight, tensors.get(name), path)
        self.profiles.load_weights(tensors)
        self.best.load({name.removeprefix("best."): tensor for name, tensor in tensors.items() if "best." in name})

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the sampler which epoch begins and which profiles have stopped."""
        self.sampler.set_epoch(state.global_step // self._steps)
        self.sampler.stopped = self.best.stopped

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """At the end of an epoch, evaluate: before a checkpoint of this step is written."""
        if self.evaluator is None or state.global_step % self._steps:
            return
        losses = self.evaluator.losses(kwargs["model"], ~self.best.stopped)
        self.best.update(losses, *self.profiles.packed(), state.global_step)
        if self.best.stopped.all():
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the training state, the last of a checkpoint's files."""
        if not args.should_save:
            return
        tensors = {f"best.{name}": tensor for name, tensor in self.best.tensors().items()}
        tensors.update({name: weight.detach() for name, weight in self.profiles.weights().items()})
        folder = checkpoint_folder(args, state.global_step)
        write_tensors(folder / STATE_FILE, tensors, {"global_step": str(state.global_step), "run": self.run})
