"""A predictor that learns and forgets people while it answers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bank.bank import ProfileBank
from ..bank.live import LiveBank
from ..bank.profile import Profile
from ..bank.serving import put_in_place
from ..training.learn import Learner, ProfileLearning
from .offsets import without_offsets
from .predictor import Prediction, Predictor
from .table import of_person


class LivePredictor(Predictor):
    """Answers with the profiles that a live bank holds at each call, whichever process wrote them.

    A call reads only the profiles of the people asked for, so its cost does not depend on how many people there are.

    Args:
        live: see :class:`~peft_xmask.bank.live.LiveBank`.
        base: the base model. None: the one that the bank names.
        device: where to compute. None: on the CPU.
        learning: settings of :meth:`learn`; None: the defaults.

    Raises:
        ConfigError: a bank without a recorded head, or without the name of its base.
        OSError: the base cannot be found.
    """

    def __init__(
        self,
        live: LiveBank,
        base: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
        learning: ProfileLearning | None = None,
    ) -> None:
        super().__init__(_with_one(live.kind), base, device=device)
        self.live = live
        self._learner: Learner | None = None
        self._learning = learning
        self._profiles: dict[str, Profile] = {}

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, **kwargs: Any
    ) -> LivePredictor:
        """Open the live bank in a folder. Arguments and errors are the class's."""
        return cls(LiveBank.open(folder), base, **kwargs)

    def learn(self, name: str, examples: Sequence[tuple[str, object]]) -> Profile:
        """Learn a person from a few labelled texts and put the profile into the bank. It is on disk when this returns.

        Args:
            name: of the person; an earlier profile of theirs is replaced.
            examples: pairs of a text and a label, as a table would have them.

        Returns:
            The profile. Its gains are zero if masks did not help on held-out texts.

        Raises:
            ConfigError: an invalid name, or no examples.
            FileFormatError: a text or label that is unusable; the message says which.
        """
        rows = of_person(name, examples, self.head)
        encoded = self.tokenizer([text for text, _ in rows], truncation=True, max_length=self.max_length)
        columns = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
        labels = [label for _, label in rows]
        profile = self.learner().learn([{**row, "labels": label} for row, label in zip(columns, labels, strict=True)])
        self.live.put(name, profile)
        return profile

    def learner(self) -> Learner:
        """The learner, made when it is first needed."""
        if self._learner is None:
            self._learner = Learner(self.model, self.bank, self._learning, processing_class=self.tokenizer)
        return self._learner

    def forget(self, name: str) -> None:
        """Remove a person from the bank, on disk too when this returns.

        Raises:
            KeyError: no such person.
        """
        self.live.delete(name)

    def predict(
        self, texts: Sequence[str], who: str | Sequence[str | None] | None = None, *, batch_size: int = 32
    ) -> list[Prediction]:
        """As :meth:`Predictor.predict`, with the people that the live bank has now."""
        people = [who] if who is None or isinstance(who, str) else list(who)
        self._profiles = {}
        for name in dict.fromkeys(people):
            profile = None if name is None else self.live.get(name)
            if name is not None and profile is not None:
                self._profiles[name] = profile
        if self._profiles:
            put_in_place(self.model, "bank", without_offsets(_bank_of(self.live.kind, self._profiles)).content())
        return super().predict(texts, who, batch_size=batch_size)

    def _rows(self, people: Sequence[str | None]) -> list[int | None]:
        numbers = {name: row for row, name in enumerate(self._profiles)}
        return [None if name is None else numbers.get(name) for name in people]

    def _offsets(self, people: Sequence[str | None], rows: Sequence[int | None]) -> Tensor:
        found = torch.zeros(len(rows), len(self.head.labels))
        for place, name in enumerate(people):
            profile = None if name is None else self._profiles.get(name)
            if profile is not None and profile.offsets is not None:
                found[place] = profile.offsets
        return found


def _bank_of(kind: ProfileBank, profiles: dict[str, Profile]) -> ProfileBank:
    bank = kind.select([])
    for name, profile in profiles.items():
        bank.put(name, profile)
    return bank


def _with_one(kind: ProfileBank) -> ProfileBank:
    """A bank of a live bank's kind with one profile in it, since a model serves at least one row."""
    spec = kind.spec
    if spec.mask_type == "hard":
        chosen = np.packbits(np.arange(spec.num_adapters) < spec.top_k, bitorder="little")
        bits = torch.from_numpy(chosen).expand(2, spec.num_sites, -1).clone()
    else:
        bits = torch.zeros(kind.content().bits.shape[1:], dtype=torch.uint8)
    content = kind.content()
    parts: list[Tensor | None] = [
        None if rows is None else torch.zeros(rows.shape[1:], dtype=torch.uint8)
        for rows in (content.gain_bits, content.offset_bits)
    ]
    bank = kind.select([])
    bank.put("-", Profile(bits, *parts))
    return bank
