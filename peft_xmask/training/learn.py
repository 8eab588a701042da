"""Learning one profile from a few examples, in about a second."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..bank.bank import ProfileBank
from ..bank.names import NameIndex
from ..bank.profile import Profile
from ..core.packing import pack_halves, unpack_halves
from ..errors import ConfigError
from .collator import forward_columns
from .defaults import padding_collator
from .evaluation import ExampleLoss, example_losses
from .offsets import SharedOutputs, fit_offsets
from .prefix import Prefix
from .profile_model import ProfileModel
from .twin import sharing_weights

_FOLDS = 2
_ERRORS = 2  # standard errors by which a mask must help beside an offset
_ALL = 0  # the row that learns from all examples; the next rows each leave out a part of them


@dataclass(frozen=True)
class ProfileLearning:
    """How a single profile is learnt, for :func:`learn_profile`.

    Args:
        steps: of the optimizer (Adam), each on a batch of the examples.
        batch_size: examples in a step; fewer examples are one batch.
        mask_learning_rate: learning rate of the mask logits.
        prior_strength: over a fitted pool, the weight of the prior fitted with it, of which each example's loss has an
            equal share; see :class:`~peft_xmask.ProfileTraining`. 0: no prior.
        gain_factors: candidates for how far the profile deviates: its gains are multiplied by the factor that does best
            on examples that were left out, by the mean change of the loss plus one standard error; beside an offset,
            plus two, since most of what labels say is then said. 0 is no deviation. Beside an offset, and where a prior
            counts, factors above 1 are left out.
        min_examples: with fewer examples, a person who has an offset gets no mask, unless a prior holds it back or 0 is
            no candidate. A few labels, most of them alike, cannot tell a mask from chance: over random pools, masks
            made people with 5 or 20 labels worse than their offset alone.
        example_loss: computes the loss of each example from a model's outputs and the batch. None:
            :func:`~peft_xmask.training.evaluation.example_losses`.

    Raises:
        ConfigError: an invalid value.
    """

    steps: int = 6
    batch_size: int = 32
    mask_learning_rate: float = 0.3
    prior_strength: float = 3.0
    gain_factors: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0)
    min_examples: int = 40
    example_loss: ExampleLoss | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "mask_learning_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)!r} is invalid: expected a number above 0.")
        if self.min_examples < 0:
            raise ConfigError(f"min_examples={self.min_examples!r} is invalid: expected a number of at least 0.")
        if not 0 <= self.prior_strength < math.inf:
            raise ConfigError(f"prior_strength={self.prior_strength!r} is invalid: expected a number of at least 0.")
        if not self.gain_factors or not all(0 <= factor < math.inf for factor in self.gain_factors):
            raise ConfigError(f"gain_factors={self.gain_factors!r} is invalid: expected numbers of at least 0.")


class Learner:
    """Learns profiles of a bank, one after another, beside a model that may be serving meanwhile.

    The model is not modified. The learner shares its weights and has an adapter and a head of its own, so making one
    costs as much as attaching the bank. The same examples give the same profile. Threads take turns.

    Args:
        model: the base of the bank, or a model that serves the bank.
        bank: whose pool and head are used.
        settings: None: the defaults.
        processing_class: tokenizer that pads batches.
        data_collator: makes a batch of examples. None: pads with ``processing_class`` if there is one.

    Raises:
        ConfigError: the bank has no head, or one that does not suit.
        BaseMismatchError, PoolMismatchError: the bank belongs to another base or pool.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: ProfileBank,
        settings: ProfileLearning | None = None,
        *,
        processing_class: Any = None,
        data_collator: Callable[[list[dict[str, Any]]], Any] | None = None,
    ) -> None:
        self.settings = settings or ProfileLearning()
        self.data_collator = data_collator or padding_collator(processing_class)
        rows = NameIndex.build(str(row) for row in range(1 + _FOLDS))
        learning_rate = 1e-3  # of Adam; logit_scale makes the steps of the logits as long as is asked for
        scale = self.settings.mask_learning_rate / learning_rate
        self._profiles = ProfileModel.of(sharing_weights(model), None, bank.select([]), rows, scale)
        self._model = self._profiles.model.eval()
        for parameter in self._profiles.head().values():
            parameter.requires_grad_(False)
        self._weights = list(self._profiles.weights().values())
        self._start = [weight.detach().clone() for weight in self._weights]
        self._offset_count = bank.offset_count
        self._offset_variance: float | None = (bank.config.training or {}).get("offset_variance")
        self._prefix = Prefix.of(self._model)
        self._columns = forward_columns(self._model)
        self._learning_rate = learning_rate
        self._turn = threading.Lock()
        self._has_run = False

    def learn(self, examples: Iterable[Mapping[str, Any]]) -> Profile:
        """The masks that suit some examples.

        Args:
            examples: tokenised, with labels. Columns that the model does not take are ignored.

        Returns:
            The profile, with an offset if those of the bank have one. Its gains are zero where masks do not help with
            examples that they were not learnt from.

        Raises:
            ConfigError: no examples, or labels whose loss is not known.
        """
        kept = [{key: each[key] for key in each if key in self._columns} for each in examples]
        if not kept:
            raise ConfigError("Expected at least one example to learn from, found none.")
        batch = self.data_collator(kept)
        device = next(self._model.parameters()).device
        batch = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
        with self._turn, torch.random.fork_rng(devices=[]):
            return self._learn(batch, len(kept))

    def _learn(self, batch: dict[str, Tensor], count: int) -> Profile:
        with torch.no_grad():
            for weight, start in zip(self._weights, self._start, strict=True):
                weight.copy_(start)
        fold_of = _folds(batch.get("labels"), count)
        rows = [_ALL, *(1 + fold for fold in range(_FOLDS))] if count >= 2 * _FOLDS else [_ALL]
        pairs = [
            (row, place) for row in rows for place in range(count) if row == _ALL or int(fold_of[place]) != row - 1
        ]
        nobody = {**batch, "adapter_names": torch.full((count,), -1)}
        states = None if self._prefix is None else self._prefix.record(self._model, nobody, skip=self._has_run)
        self._has_run = True
        offset_bits = self._offsets(nobody, pairs)
        mine = None if offset_bits is None else offset_bits[_ALL].clone()
        if self._offset_alone(count):
            bits, gain_bits = self._profiles.packed()
            return Profile(bits[_ALL].clone(), None if gain_bits is None else torch.zeros_like(gain_bits[_ALL]), mine)
        self._fit(batch, states, pairs, len(rows), count)
        bits, gain_bits = self._profiles.packed()
        if gain_bits is None:
            return Profile(bits[_ALL].clone(), None, mine)
        factor = self._factor(batch, states, fold_of, (bits, gain_bits)) if len(rows) > 1 else count / (count + _FOLDS)
        return Profile(bits[_ALL].clone(), pack_halves(unpack_halves(gain_bits[_ALL]) * factor), mine)

    def _offsets(self, nobody: dict[str, Tensor], pairs: list[tuple[int, int]]) -> Tensor | None:
        """Offsets of every row, from the examples that it learns from; None where the bank has none."""
        if self._offset_count is None:
            return None
        self._profiles.set_offsets(None)
        labels = nobody.get("labels")
        with torch.no_grad():
            outputs = self._model(**{key: value for key, value in nobody.items() if key != "labels"}).logits
        shared = SharedOutputs.checked(outputs, labels)
        rows, places = (torch.tensor(each) for each in zip(*pairs, strict=True))
        variance = shared.default_variance if self._offset_variance is None else self._offset_variance
        offset_bits = pack_halves(fit_offsets(shared[places], rows, 1 + _FOLDS, variance))
        self._profiles.set_offsets(offset_bits)
        return offset_bits

    def _fit(
        self, batch: dict[str, Tensor], states: Tensor | None, pairs: list[tuple[int, int]], rows: int, count: int
    ) -> None:
        """Train every row on its examples, all rows at once."""
        optimizer = torch.optim.Adam(self._weights, lr=self._learning_rate)
        share = min(1.0, self.settings.batch_size / count)
        size = max(rows, round(len(pairs) * share))
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)) if share < 1 else None
        for step in range(self.settings.steps):
            if order is None:
                drawn = pairs
            else:
                drawn = [pairs[int(order[(step * size + place) % len(pairs)])] for place in range(size)]
            row_of = torch.tensor([row for row, _ in drawn])
            losses = self._losses(batch, states, row_of, torch.tensor([place for _, place in drawn]))
            means = torch.zeros(rows).index_add(0, row_of, losses.cpu()) / torch.bincount(
                row_of, minlength=rows
            ).clamp_min(1)
            optimizer.zero_grad()
            (means.sum() + self._prior(pairs, rows)).backward()
            optimizer.step()

    def _offset_alone(self, count: int) -> bool:
        """Whether there are too few examples for a mask beside the offset."""
        few = count < self.settings.min_examples and 0.0 in self.settings.gain_factors
        return few and self._offset_count is not None and not self._has_prior and self._profiles.masks.spec.learn_gain

    @property
    def _has_prior(self) -> bool:
        return self._profiles.masks.fitting is not None and self.settings.prior_strength > 0

    @property
    def _factors(self) -> list[float]:
        """Candidates for the factor of the gains, in order. With a prior, or beside an offset, none goes further."""
        known = sorted(self.settings.gain_factors)
        held = self._has_prior or self._offset_count is not None
        return [factor for factor in known if factor <= 1] or known if held else known

    def _prior(self, pairs: list[tuple[int, int]], rows: int) -> Tensor:
        """Minus the log prior of every row, by example that it learns from; zero where the pool has none."""
        if not self._has_prior:
            return torch.zeros(())
        masks, strength = self._profiles.masks, self.settings.prior_strength
        counts = torch.bincount(torch.tensor([row for row, _ in pairs]), minlength=rows).clamp_min(1)
        return (masks.minus_log_prior(torch.arange(rows)).cpu() * strength / counts).sum()

    def _factor(
        self, batch: dict[str, Tensor], states: Tensor | None, fold_of: Tensor, packed: tuple[Tensor, Tensor]
    ) -> float:
        """The factor of the gains that does best on the examples which each row was not trained on.

        Of the mean change of the loss against the smallest factor, plus one standard error (beside an offset, two), so
        that a mask which helps by chance is left out.
        """
        bits, gain_bits = packed
        gains, row_of, places = unpack_halves(gain_bits), 1 + fold_of, torch.arange(len(fold_of))
        found = []
        for factor in self._factors:
            self._profiles.load((bits, pack_halves(gains * factor)))
            with torch.no_grad():
                found.append(self._losses(batch, states, row_of, places).double().cpu())
        change = torch.stack(found) - found[0]
        errors = _ERRORS if self._offset_count is not None else 1
        score = change.mean(1) + errors * change.std(1) / len(places) ** 0.5
        return self._factors[int(score.argmin())]

    def _losses(self, batch: dict[str, Tensor], states: Tensor | None, rows: Tensor, places: Tensor) -> Tensor:
        some = {key: value[places.to(value.device)] for key, value in batch.items()}
        skipped = None if states is None else states[places.to(states.device)]
        loss = self.settings.example_loss or partial(example_losses, causal=self._profiles.causal)
        if self._prefix is None:
            return loss(self._model(**some, adapter_names=rows), some)
        with self._prefix.replayed(skipped):
            return loss(self._model(**some, adapter_names=rows), some)


_LEARNERS: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], Learner]] = weakref.WeakKeyDictionary()
_MAKING = threading.Lock()


def learn_profile(
    model: nn.Module,
    bank: ProfileBank,
    name: str,
    examples: Sequence[Mapping[str, Any]],
    settings: ProfileLearning | None = None,
    *,
    processing_class: Any = None,
    data_collator: Callable[[list[dict[str, Any]]], Any] | None = None,
) -> Profile:
    """Learn one profile from a few examples and enter it in a bank, in place of one of the same name.

    The first call for a model makes a :class:`Learner`, which is kept for the next ones.

    Args:
        model: the base of the bank, or a model that serves the bank. It is not modified: a model that serves the bank
            does not see the profile before :meth:`~peft_xmask.ProfileBank.replace`.
        bank: gets the profile. Its other profiles and its head stay as they are.
        name: of the profile.
        examples: tokenised, with labels.
        settings: None: the defaults.
        processing_class: tokenizer that pads batches.
        data_collator: makes a batch of examples. None: pads with ``processing_class`` if there is one.

    Returns:
        The profile.

    Raises:
        ConfigError: an invalid name, no examples, or labels whose loss is not known.
        BaseMismatchError, PoolMismatchError: the bank belongs to another base or pool.
    """
    config = bank.config
    key = (
        config.base_fingerprint, config.pool_fingerprint, config.scale, config.top_k, settings, id(processing_class),
        id(data_collator), *(id(tensor) for tensor in bank.shared.values()),
    )  # fmt: skip
    with _MAKING:
        known = _LEARNERS.get(model)
        if known is None or known[0] != key:
            learner = Learner(model, bank, settings, processing_class=processing_class, data_collator=data_collator)
            known = _LEARNERS[model] = key, learner
    profile = known[1].learn(examples)
    bank.put(name, profile)
    return profile


def _folds(labels: Tensor | None, count: int) -> Tensor:
    """Which fold each example is in, long ``[n]``: drawn, and balanced over the labels where each example has one."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    if labels is not None and labels.dim() == 1:
        order = order[torch.argsort(labels.cpu()[order], stable=True)]
    folds = torch.empty(count, dtype=torch.long)
    folds[order] = torch.arange(count) % _FOLDS
    return folds
