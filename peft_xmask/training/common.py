"""The common part: one adapter that is trained on the examples of all profiles, before any of them."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, set_seed

from ..core.files import read_tensors, write_tensors
from ..errors import ConfigError
from ..pool import AdapterPool
from ..tuners.bottleneck import BottleneckConfig
from ..tuners.xpeft import XPEFTConfig
from . import distributed as ranks
from .checkpoints import difference
from .collator import forward_columns
from .data import ProfileData
from .evaluation import ExampleLoss, example_losses
from .settings import ProfileTraining
from .trainer import BarCallback
from .twin import sharing_weights

POOL_FOLDER, HEAD_FILE = "pool", "common_head.safetensors"
"""Beside the checkpoints: the pool around the common adapter, and the head that was trained with it, written last."""

_SAME_FIELDS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "task_type")


def with_common_part(
    model: nn.Module, data: ProfileData, settings: ProfileTraining, *, progress: bool
) -> tuple[nn.Module, ProfileTraining]:
    """Train the common adapter and the head on all examples, or take them from ``output_dir`` if this run trained them.

    Of the epochs, the one with the smallest validation loss is kept; without validation examples, the last one.

    Args:
        model: a base. It is not modified.
        data: the examples; whose they are plays no part.
        settings: resolved ones, with ``common_size`` above 0.
        progress: whether to show a bar.

    Returns:
        A base with the same weights and the head that was trained; and settings whose pool has the common part, and
        whose head is frozen.

    Raises:
        ConfigError: a model with an adapter, several processes, or a folder with the common part of another run.
    """
    if isinstance(model, PeftModel) or ranks.count() > 1:
        found = "one with adapters" if isinstance(model, PeftModel) else f"{ranks.count()} processes"
        raise ConfigError(
            f"common_size= needs the base model and one process, found {found}. Train a common adapter first, and pass "
            "XPEFTConfig(pool=AdapterPool.random(...).with_common(adapter))."
        )
    config = settings.config or XPEFTConfig(task_type="SEQ_CLS")
    folder = Path(str(settings.trainer.output_dir))
    run = json.dumps({**data.fingerprint, **settings.identity()})
    base = sharing_weights(model)
    if not _is_there(folder, run):
        adapted = _trained(base, config, data, settings, progress)
        pool = copy.copy(config).resolve_pool(model).with_common(adapted)
        pool.save_pretrained(folder / POOL_FOLDER)
        write_tensors(folder / HEAD_FILE, _head_of(adapted), {"run": run})
        base = sharing_weights(model)
    _put_head(base, read_tensors(folder / HEAD_FILE)[0])
    config = copy.copy(config)
    config.pool = AdapterPool.from_pretrained(folder / POOL_FOLDER)
    config.target_modules = None  # those of the common part
    return base, dataclasses.replace(settings, config=config, head="frozen", common_size=0)


def _trained(
    base: nn.Module, config: XPEFTConfig, data: ProfileData, settings: ProfileTraining, progress: bool
) -> PeftModel:
    set_seed(settings.trainer.seed)
    fields = {name: getattr(config, name) for name in _SAME_FIELDS if hasattr(config, name)}
    adapter = BottleneckConfig(bottleneck_size=settings.common_size, use_bias=False, **fields)
    adapter.settle_form(config.form)
    adapted = get_peft_model(base, adapter)
    collator = WithoutProfiles(settings.data_collator, forward_columns(adapted) - {data.column})
    args = copy.copy(settings.trainer)
    args.num_train_epochs, args.save_strategy = settings.common_epochs, "no"  # type: ignore[assignment]
    args.learning_rate = settings.common_learning_rate
    size = settings.trainer.per_device_eval_batch_size
    best = BestEpoch(adapted, data.validation, collator, settings.example_loss, size)
    callbacks: list[TrainerCallback] = [best, *([BarCallback("common part")] if progress else [])]
    trainer = Trainer(adapted, args, train_dataset=data.dataset, data_collator=collator, callbacks=callbacks)
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    trainer.train()
    best.restore()
    return adapted


class WithoutProfiles:
    """A collator that drops the columns which the model does not take, that of the profiles among them."""

    def __init__(self, collator: Any, columns: Iterable[str]) -> None:
        self.collator, self.columns = collator, frozenset(columns)

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        """The inner collator's batch of the columns that are left."""
        return self.collator([{key: each[key] for key in each if key in self.columns} for each in examples])


class BestEpoch(TrainerCallback):
    """Keeps what was trained after the epoch with the smallest validation loss.

    Args:
        model: that is trained.
        validation: examples; None: nothing is evaluated, and the last epoch stays.
        collator: makes batches of them.
        example_loss: see :class:`~peft_xmask.training.settings.ProfileTraining`.
        size: examples in a batch.
    """

    def __init__(
        self,
        model: PeftModel,
        validation: Any,
        collator: Callable[[Any], Any],
        example_loss: ExampleLoss | None,
        size: int,
    ) -> None:
        self.model, self.validation, self.collator, self.size = model, validation, collator, size
        causal = getattr(model.active_peft_config, "task_type", None) == "CAUSAL_LM"
        self.loss = example_loss or partial(example_losses, causal=causal)
        self.best: tuple[float, dict[str, Tensor]] | None = None

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate."""
        self.evaluate()

    def evaluate(self) -> None:
        """Compare the mean validation loss with that of the best epoch, and keep what is trained if it is smaller."""
        if self.validation is None:
            return
        found, device = [], next(self.model.parameters()).device
        self.model.eval()
        with torch.no_grad():
            for start in range(0, len(self.validation), self.size):
                places = range(start, min(start + self.size, len(self.validation)))
                batch = self.collator([self.validation[place] for place in places])
                batch = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
                found.append(self.loss(self.model(**batch), batch).cpu())
        self.model.train()
        loss = float(torch.cat(found).mean())
        if self.best is None or loss < self.best[0]:
            self.best = loss, {name: each.detach().clone() for name, each in self._trained().items()}

    def restore(self) -> None:
        """Put back what is best, if anything was evaluated."""
        if self.best is not None:
            with torch.no_grad():
                for name, parameter in self._trained().items():
                    parameter.copy_(self.best[1][name])

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: each for name, each in self.model.named_parameters() if each.requires_grad}


def _is_there(folder: Path, run: str) -> bool:
    if not (folder / HEAD_FILE).is_file():
        return False
    _, metadata = read_tensors(folder / HEAD_FILE)
    found = metadata.get("run", "{}")
    if found != run:
        raise ConfigError(
            f"'{folder}' holds the common part of another run, trained with "
            f"{difference(json.loads(found), json.loads(run))}. Use another output_dir, or delete '{HEAD_FILE}' there."
        )
    return True


def _head_of(model: PeftModel) -> dict[str, Tensor]:
    """What was trained besides the adapter, by its name in the base."""
    marks = (".modules_to_save.default.", "base_model.model.")
    return {
        name.replace(marks[0], ".").removeprefix(marks[1]): each.detach()
        for name, each in model.named_parameters()
        if marks[0] in name
    }


def _put_head(base: nn.Module, head: dict[str, Tensor]) -> None:
    """Give a base another head, without touching the tensors that it shares."""
    for name, tensor in head.items():
        owner, _, last = name.rpartition(".")
        module = base.get_submodule(owner)
        old: Any = getattr(module, last)
        setattr(module, last, nn.Parameter(tensor.to(old.device, old.dtype, copy=True), requires_grad=False))
