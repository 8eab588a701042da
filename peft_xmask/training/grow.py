"""Growing adapters one after another on one base: first the common one, then one for each group from there."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, set_seed

from ..core.files import read_tensors, write_tensors
from ..core.fingerprint import digest_of
from ..errors import ConfigError
from ..integrations.checkpoints import checkpoint_folder
from ..pool.pool import read_model
from ..pool.trained import TrainedAdapter
from . import distributed as ranks
from .checkpoints import STATE_FILE, difference, last_checkpoint
from .collator import forward_columns
from .common import BestEpoch, WithoutProfiles
from .groups import Group
from .pool_settings import PoolFitting
from .trainer import BarCallback
from .twin import sharing_weights

State = dict[str, Tensor]
"""What is trained, adapter and head, by parameter name."""
START, COMMON = "start", "common"


class Grower:
    """A base with one adapter, which is trained again and again, each time from a given start.

    What is finished is a file in ``folder``; with ``resume`` it is read instead of trained. Every training has the same
    seed, so it does not matter which of them were read.

    Args:
        model: a base. It is not modified.
        settings: resolved ones.
        folder: of the files.
        data: digests of the data, which tell runs apart.
        resume: whether to read what is finished.
        progress: whether to show bars.

    Raises:
        ConfigError: a model with an adapter, or a folder with the files of another run.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: PoolFitting,
        folder: Path,
        data: dict[str, str | None],
        *,
        resume: bool,
        progress: bool,
    ) -> None:
        if isinstance(model, PeftModel):
            raise ConfigError("Expected a base model to fit a pool on, found one with adapters. Pass the base.")
        self.settings, self.folder, self.resume = settings, folder, resume
        self.progress = progress and ranks.number() == 0
        set_seed(settings.trainer.seed)
        self.model = get_peft_model(sharing_weights(model), copy.copy(settings.config))  # type: ignore[arg-type]
        config = json.dumps(self.model.peft_config["default"].to_dict(), sort_keys=True, default=_plain)
        self.run = json.dumps({**data, **settings.identity(), "adapter": digest_of([config.encode()])})
        ranks.require_same(self.run, settings.trainer.device)
        self._names = [name for name, each in self.model.named_parameters() if each.requires_grad]
        self.collator = WithoutProfiles(settings.data_collator, forward_columns(self.model) - {settings.profile_column})
        self.start = self._stage(START, lambda: None)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained. Looked up at each use, since PEFT may replace parameters when it loads a checkpoint."""
        found = dict(self.model.named_parameters())
        return {name: found[name] for name in self._names}

    def grow_common(self, dataset: Any, validation: Any) -> State:
        """Train the adapter and the head on everything; of the epochs, the best by validation is kept.

        Where ``args`` saves checkpoints, a training that was interrupted continues from the last one.
        """

        def train() -> None:
            self._load(self.start)
            args = copy.copy(self.settings.trainer)
            args.output_dir = str(self.folder / COMMON)
            checkpoint = last_checkpoint(Path(args.output_dir), self.run, resume=self.resume)
            keeper = _CheckpointedBest(self.model, validation, self.collator, self.settings, self.run)
            self._train(dataset, args, [keeper], "common part", resume_from=checkpoint)
            keeper.restore()

        return self._stage(COMMON, train)

    def grow(self, group: Group, dataset: Any, common: State, title: str) -> State:
        """Train the adapter on a group's examples, from the common one."""

        def train() -> None:
            self._load({**common, **({} if group.classes is None else self._head(self.start))})
            args = copy.copy(self.settings.trainer)
            args.output_dir, args.save_strategy = str(self.folder), "no"  # type: ignore[assignment]
            args.max_steps, args.learning_rate = self.settings.group_steps, self.settings.group_learning_rate
            head = self._head(self.trained)
            for parameter in head.values():
                parameter.requires_grad_(group.classes is not None)
            self._train(Subset(dataset, group.places), args, [], title, classes=group.classes)
            for parameter in head.values():
                parameter.requires_grad_(True)

        return self._stage(f"group-{digest_of([group.name.encode()])}", train)

    def adapter(self, state: State, name: str) -> TrainedAdapter:
        """The adapter of a state, without its head."""
        self._load(state)
        return dataclasses.replace(read_model(self.model, "default"), source=name)

    def _train(
        self,
        dataset: Any,
        args: Any,
        callbacks: list[TrainerCallback],
        title: str,
        *,
        classes: Tensor | None = None,
        resume_from: Path | None = None,
    ) -> None:
        set_seed(args.seed)
        head = list(self._head(self.trained).values())
        adapter = [each for each in self.trained.values() if not any(each is other for other in head)]
        head_rate = self.settings.head_learning_rate or args.learning_rate
        groups = [
            {"params": [each for each in part if each.requires_grad], "lr": rate}
            for part, rate in ((adapter, args.learning_rate), (head, head_rate))
        ]
        optimizer = torch.optim.AdamW(
            [each for each in groups if each["params"]],
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )
        trainer = _ClassTrainer(
            self.model, args, train_dataset=dataset, data_collator=self.collator, classes=classes,
            callbacks=[*callbacks, *([BarCallback(title)] if self.progress else [])], optimizers=(optimizer, None),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))

    def _stage(self, name: str, train: Any) -> State:
        """What ``train`` leaves in the model; read from the stage's file if there is one and the run is resumed."""
        path = self.folder / f"{name}.safetensors"
        if self._is_there(path):
            if ranks.number() == 0:
                self._load(read_tensors(path)[0])
        else:
            train()
            if ranks.number() == 0:
                write_tensors(path, self._state(), {"run": self.run})
        ranks.send_from_first(self.trained.values(), self.settings.trainer.device)
        return self._state()

    def _is_there(self, path: Path) -> bool:
        """Whether process 0 finds a file of this run. All processes get its answer, or its error."""
        found, run = 0, "{}"
        if ranks.number() == 0 and path.is_file():
            run = read_tensors(path)[1].get("run", "{}")
            found = 1 if run == self.run else 2
        device = self.settings.trainer.device
        found = int(ranks.total(torch.tensor(found), device))
        if found == 2:
            told = difference(json.loads(run), json.loads(self.run)) if ranks.number() == 0 else "see process 0"
            raise ConfigError(
                f"'{self.folder}' holds '{path.name}' of another run, fitted with {told}. Use another output_dir, or "
                "delete the files there."
            )
        return self.resume and found == 1

    def _state(self) -> State:
        return {name: each.detach().cpu().clone() for name, each in self.trained.items()}

    def _load(self, state: State) -> None:
        with torch.no_grad():
            for name, each in self.trained.items():
                each.copy_(state[name])

    @staticmethod
    def _head(state: dict[str, Any]) -> dict[str, Any]:
        return {name: each for name, each in state.items() if ".modules_to_save." in name}


class _ClassTrainer(Trainer):
    """A Trainer that shows no progress of its own, and may learn some classes among themselves only."""

    def __init__(self, model: nn.Module, *args: Any, classes: Tensor | None, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.classes = classes
        self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs and classes is None
        for printing in (PrinterCallback, ProgressCallback):
            self.remove_callback(printing)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's loss; of some classes, the cross-entropy over these."""
        if self.classes is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        logits = outputs.logits.float()
        logits = logits.masked_fill(~self.classes.to(logits.device), -torch.inf)
        loss = nn.functional.cross_entropy(logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class _CheckpointedBest(BestEpoch):
    """Keeps the best epoch, and writes it beside each checkpoint, as the last of the checkpoint's files."""

    def __init__(self, model: PeftModel, validation: Any, collator: Any, settings: PoolFitting, run: str) -> None:
        super().__init__(
            model, validation, collator, settings.example_loss, settings.trainer.per_device_eval_batch_size
        )
        self.run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the best epoch of a checkpoint."""
        if state.global_step:
            tensors, metadata = read_tensors(checkpoint_folder(args, state.global_step) / STATE_FILE)
            if "loss" in metadata:
                self.best = float(metadata["loss"]), tensors

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluated at the end of an epoch's last step, before a checkpoint of it is written."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate after the last step of an epoch, and after the last of all."""
        epochs = max(1, round(args.num_train_epochs)) if args.max_steps <= 0 else 1
        if state.global_step % max(1, -(-state.max_steps // epochs)) == 0 or state.global_step == state.max_steps:
            self.evaluate()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the best epoch so far."""
        if not args.should_save:
            return
        loss, tensors = (None, {"none": torch.zeros(1)}) if self.best is None else self.best
        metadata = {"run": self.run, "global_step": str(state.global_step)}
        metadata |= {} if loss is None else {"loss": repr(loss)}
        write_tensors(checkpoint_folder(args, state.global_step) / STATE_FILE, tensors, metadata)


def _plain(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, (set, frozenset)) else str(value)
