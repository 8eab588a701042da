"""One training run in this process and the processes that train with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from ..bank.bank import ProfileBank
from ..bank.names import NameIndex
from ..core.fingerprint import digest_of, fingerprint_weights
from ..core.packing import pack_halves
from ..errors import ConfigError
from . import distributed as ranks
from .best_rows import BestRows
from .checkpoints import last_checkpoint
from .choice import choose_layers
from .collator import ProfileCollator
from .data import ProfileData
from .evaluation import Evaluator, example_losses
from .head import train_head
from .offset_prior import likeliest_variance
from .offsets import SharedOutputs, fit_offsets
from .prefix import Prefix
from .profile_model import ProfileModel
from .row_adamw import RowAdamW
from .sampler import ProfileBatchSampler
from .settings import ProfileTraining
from .states import ExamplesWithStates, StatesCollator, StatesRecorder, replaying
from .trained_bank import TrainedBank
from .trainer import BarCallback, ProfilesCallback, ProfileTrainer


@dataclass(frozen=True)
class TrainingRun:
    """What is trained, on what, and how.

    Attributes:
        profiles: the model with a row for each profile.
        data: the examples.
        settings: resolved ones.
        bank: which the profiles join, or None.
        start: digest of what the bank that the profiles join gave them; None without a bank.
        progress: whether to show a progress bar.
    """

    profiles: ProfileModel
    data: ProfileData
    settings: ProfileTraining
    bank: ProfileBank | None
    start: str | None
    progress: bool

    @classmethod
    def prepare(
        cls,
        model: nn.Module,
        data: ProfileData,
        settings: ProfileTraining,
        bank: ProfileBank | None,
        *,
        progress: bool,
        index: NameIndex | None = None,
    ) -> TrainingRun:
        """Adapt the model, and check that all processes have the same.

        Args:
            index: names of the rows; None: those of the data.

        Raises:
            ConfigError, BaseMismatchError, PoolMismatchError: the model, config or bank does not suit.
        """
        set_seed(settings.trainer.seed)  # a single row starts at random
        logit_scale = settings.mask_learning_rate / settings.trainer.learning_rate
        profiles = ProfileModel.of(model, settings.config, bank, index or data.index, logit_scale)
        if settings.offset and bank is not None and len(bank) and not bank.offset_count:
            raise ConfigError("Expected a bank whose profiles have offsets, as offset=True says, found one without.")
        run = cls(profiles, data, settings, bank, None if bank is None else _digest(bank, data.index), progress)
        ranks.require_same(run.identity, settings.trainer.device)
        ranks.send_from_first(profiles.head().values(), settings.trainer.device)
        return run

    @cached_property
    def identity(self) -> str:
        """What distinguishes this run from others, as JSON: data, settings, adapter and start."""
        facts = {**self.data.fingerprint, **self.settings.identity(), "adapter": self.profiles.identity()}
        return json.dumps({**facts, "bank": self.start})

    @cached_property
    def folder(self) -> Path:
        """Where checkpoints and metrics are written."""
        return Path(str(self.settings.trainer.output_dir))

    @cached_property
    def prefix(self) -> Prefix | None:
        """The blocks whose states are kept; None: none are.

        Raises:
            ConfigError: the settings name a folder, and there is nothing to keep in it.
        """
        if self.settings.cache is None:
            return None
        prefix = Prefix.of(self.profiles.model)
        obstacle = "no block comes before the first adapted one"
        if prefix is not None:
            found = self._recorder(prefix).obstacle(self.data.dataset)
            if found is None:
                return prefix
            obstacle = found
        if self.settings.cache != "auto":
            raise ConfigError(
                f"cache='{self.settings.cache}' is invalid for this run: {obstacle}. Adapt the last blocks only "
                "(layers_to_transform= of the config), or leave cache= out."
            )
        return None

    def _recorder(self, prefix: Prefix) -> StatesRecorder:
        size = self.settings.trainer.per_device_eval_batch_size
        facts = {"base": fingerprint_weights(each for block in prefix.blocks for each in block.parameters())}
        return StatesRecorder(self.profiles.model, prefix, self._plain_collator, size, facts)

    @cached_property
    def examples(self) -> Any:
        """The training examples, with their states if these are kept."""
        return self._with_states(self.data.dataset, "training", "examples")

    @cached_property
    def held_out_examples(self) -> Any:
        """The same of the validation examples; None if there are none."""
        return (
            None
            if self.data.validation is None
            else self._with_states(self.data.validation, "validation", "validation")
        )

    def _with_states(self, dataset: Any, folder: str, digest: str) -> Any:
        if self.prefix is None:
            return dataset
        assert self.settings.cache is not None
        place = None if self.settings.cache == "auto" else Path(self.settings.cache) / folder
        fingerprint = str(self.data.fingerprint[digest])
        return ExamplesWithStates(dataset, self._recorder(self.prefix).states(dataset, place, fingerprint))

    @cached_property
    def sampler(self) -> ProfileBatchSampler:
        """Which examples a step sees."""
        return ProfileBatchSampler(
            self.data.rows,
            self.settings.batch_size,
            temperature=self.settings.sampling_temperature,
            max_passes=self.settings.max_passes,
            seed=self.settings.trainer.seed,
            part=(ranks.number(), ranks.count()),
            lengths=self.data.lengths if self.settings.grouped_by_length else None,
        )

    @cached_property
    def collator(self) -> ProfileCollator | StatesCollator:
        """Makes batches that say whose each example is, with the states that are kept."""
        return self._plain_collator if self.prefix is None else StatesCollator(self._plain_collator)

    @cached_property
    def _plain_collator(self) -> ProfileCollator:
        inner = self.settings.data_collator
        assert inner is not None
        return ProfileCollator(inner, self.data.index, column=self.data.column, model=self.profiles.model)

    @cached_property
    def evaluator(self) -> Evaluator | None:
        """Validation losses of the profiles; None without validation examples."""
        if self.data.held_out is None:
            return None
        return Evaluator(
            self.held_out_examples,
            self.data.held_out,
            len(self.data.index),
            self.collator,
            self.settings.trainer.per_device_eval_batch_size,
            self.settings.example_loss or partial(example_losses, causal=self.profiles.causal),
        )

    @cached_property
    def prior(self) -> Callable[[Tensor], Tensor] | None:
        """Each example's share of its profile's minus log prior; None where the pool has none."""
        masks, strength = self.profiles.masks, self.settings.prior_strength
        if masks.fitting is None or not strength:
            return None
        counts = self.data.counts.clamp_min(1)

        def of_examples(rows: Tensor) -> Tensor:
            distinct, place = torch.unique(rows, return_inverse=True)
            shares = masks.minus_log_prior(distinct) * strength / counts.to(rows.device)[distinct.clamp_min(0)]
            return shares[place.to(shares.device)]

        return of_examples

    def trainer(self, optimizer: Any, callbacks: list[Any], **changes: Any) -> ProfileTrainer:
        """A Trainer of the model on the examples.

        Args:
            changes: other arguments than those of the run: ``args``, ``data_collator``.
        """
        shown = self.progress and ranks.number() == 0
        given = {"args": self.settings.trainer, "data_collator": self.collator, **changes}
        return ProfileTrainer(
            self.profiles.model,
            train_dataset=self.examples,
            optimizers=(optimizer, None),
            callbacks=[each for each in callbacks if shown or not isinstance(each, BarCallback)],
            prior=self.prior,
            batch_sampler=self.sampler,
            **given,
        )

    def train(self, resume: bool) -> TrainedBank:
        """Train the rows, and the head as the settings say, from the last checkpoint if ``resume``.

        Raises:
            ConfigError: the folder has checkpoints of another run, or its cache is that of another run; or there is no
                head to train.
        """
        checkpoint = last_checkpoint(self.folder, self.identity, resume=resume)
        with replaying(self.profiles.model, self.prefix):
            return self._train(checkpoint)

    def _train(self, checkpoint: Path | None) -> TrainedBank:
        for parameter in self.profiles.head().values():
            parameter.requires_grad_(self.settings.head == "joint")
        if self.settings.head == "first":
            self.train_head()
        offset_bits, variance = self._offsets()
        self.profiles.set_offsets(offset_bits)
        best = BestRows(*self.profiles.packed(), self.settings.patience)
        keeper = ProfilesCallback(self.profiles, self.sampler, best, self.evaluator, self.identity)
        args = self.settings.trainer
        optimizer = RowAdamW.for_model(
            self.profiles.model,
            lr=args.learning_rate,
            other_lr=self.settings.head_learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )
        trainer = self.trainer(optimizer, [keeper, BarCallback("profiles", best)])
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return self._bank_of(best, offset_bits, variance)

    def train_head(self) -> None:
        """Train the head alone on the base; or take it from ``output_dir`` if this run trained it before."""
        train_head(self.profiles, self.folder, self.identity, self.settings, self.trainer, self.collator)

    def _offsets(self) -> tuple[Tensor | None, float | None]:
        """Offsets of the profiles, uint8 ``[U, 2 * C]`` or None, and the variance of their prior if they were computed.

        Without ``offset`` they are those that a bank has.
        """
        names, data = self.data.index, self.data
        if not self.settings.offset:
            if self.bank is None or not self.bank.offset_count:
                return None, None
            none = torch.zeros(2 * self.bank.offset_count, dtype=torch.uint8)
            known = [self.bank[name].offset_bits if name in self.bank else none for name in names]
            return torch.stack([none if each is None else each for each in known]), None
        model, size = self.profiles.model, self.settings.trainer.per_device_eval_batch_size
        shared = SharedOutputs.of(model, self.examples, self.collator, size)
        variance = likeliest_variance(shared, data.rows)
        return pack_halves(fit_offsets(shared, data.rows, len(names), variance)), variance

    def _bank_of(self, best: BestRows, offset_bits: Tensor | None, variance: float | None) -> TrainedBank:
        profiles = self.profiles
        head_moved = self.settings.head == "joint"
        choice = choose_layers(profiles, best, self.evaluator, self.data.counts, offset_bits, head_moved=head_moved)
        profiles.config.training = {"profiles": len(self.data.index), **self.settings.summary()}
        if variance is not None:
            profiles.config.training["offset_variance"] = variance
        found = ProfileBank.from_model(profiles.model, list(profiles.index))
        trained = TrainedBank(found.config, *choice.packed, profiles.index, found.shared, choice.offset_bits)
        trained.metrics = choice.metrics
        return trained


def _digest(bank: ProfileBank, index: NameIndex) -> str:
    """A digest of a bank's head and of the masks of the profiles that are trained on."""
    parts = [repr(key).encode() + tensor.float().numpy().tobytes() for key, tensor in sorted(bank.shared.items())]
    for name in index:
        if name in bank:
            profile = bank[name]
            parts += [profile.bits.numpy().tobytes()]
            parts += [] if profile.gain_bits is None else [profile.gain_bits.numpy().tobytes()]
    return digest_of(parts)
