"""Answers of a personalised model: labels and scores for a text, for each person."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from ..bank.bank import ProfileBank
from ..core.packing import unpack_halves
from ..errors import ConfigError
from ..integrations.pooled_classifier import PooledClassifierConfig, load_classifier, load_tokenizer
from ..tuners.base.classifier import Classifier
from .offsets import without_offsets

MAX_LENGTH = 128
"""Tokens after which a text is cut, where the bank does not say."""


@dataclass(frozen=True)
class Prediction:
    """The model's answer for a text.

    Attributes:
        label: name of the best label; for regression None; for multi-label the names of all likely labels, in order.
        scores: probability of each label by name; for regression the value, by the name of the column.
        who: the person whose answer this is; None: nobody.
        personal: whether the person's profile answered; if not, the common part did.
    """

    label: str | tuple[str, ...] | None
    scores: dict[str, float]
    who: str | None
    personal: bool

    @property
    def value(self) -> float:
        """The predicted value of a regression, or the score of the best label."""
        return max(self.scores.values())


class Predictor:
    """A bank on its base model, ready to answer.

    >>> people = Predictor.from_pretrained("bank")
    >>> people.predict(["Alien (1979). Horror"], who="alice")[0].scores

    Args:
        bank: with a classification head whose pooling and label names are recorded, as ``personalize`` writes it.
        base: the base model, a folder or Hub id. None: the one that the bank names.
        device: where to compute. None: on the CPU.
        cache_bytes: memory for the mixed adapters of the people who were asked for last; 0: no cache.

    Raises:
        ConfigError: a bank without a recorded head, without profiles or without the name of its base.
        OSError: the base cannot be found.
    """

    def __init__(
        self,
        bank: ProfileBank,
        base: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
        cache_bytes: int = 0,
    ) -> None:
        self.bank = bank
        self.head = head_of(bank)
        where = base or bank.config.base_model_name_or_path
        if not where:
            raise ConfigError("The bank does not name its base model. Pass it (`--base` on the command line).")
        self.base = str(where)
        self.tokenizer = load_tokenizer(where)
        model = load_classifier(where, PooledClassifierConfig.of(self.head))
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model: PeftModel = without_offsets(bank).attach(model)
        self.index = bank.name_index()
        self.model.to(device or "cpu").eval()
        if cache_bytes:
            self.model.cache_profiles(cache_bytes)

    @classmethod
    def from_pretrained(
        cls, where: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, **kwargs: Any
    ) -> Predictor:
        """Open a bank, in a folder or on the Hub, and put it on its base. Arguments and errors are the class's."""
        return cls(ProfileBank.from_pretrained(where), base, **kwargs)

    def predict(
        self, texts: Sequence[str], who: str | Sequence[str | None] | None = None, *, batch_size: int = 32
    ) -> list[Prediction]:
        """Answer for each text.

        Args:
            texts: any number of them.
            who: one name for all texts, or one for each; None: nobody. For people without a profile the common part
                answers, and the prediction says so.
            batch_size: texts in a forward pass, for any mix of people.

        Raises:
            ConfigError: not as many names as texts, or a text that is no string.
        """
        people = [who] * len(texts) if who is None or isinstance(who, str) else list(who)
        if len(people) != len(texts):
            raise ConfigError(f"Expected a name for each of the {len(texts)} texts, found {len(people)} names.")
        for number, text in enumerate(texts, 1):
            if not isinstance(text, str):
                raise ConfigError(f"Expected a string as text {number}, found {text!r:.60}.")
        found = self._rows(people)
        rows = torch.tensor([-1 if row is None else row for row in found], dtype=torch.long)
        logits = torch.cat([*self._logits(texts, rows, batch_size)]) if texts else torch.empty(0, len(self.head.labels))
        logits = logits + self._offsets(people, found)
        return [
            self._prediction(each, name, row is not None) for each, name, row in zip(logits, people, found, strict=True)
        ]

    def replace(self, bank: ProfileBank) -> None:
        """Serve another version of the bank. Call it between two predictions.

        Raises:
            ConfigError: it has other settings, labels or another head, or no profiles.
            BaseMismatchError, PoolMismatchError: it is of another base or pool.
        """
        without_offsets(bank).replace(self.model)
        self.bank, self.index = bank, bank.name_index()

    @property
    def max_length(self) -> int:
        """Tokens after which a text is cut."""
        return self.head.max_length or MAX_LENGTH

    def _rows(self, people: Sequence[str | None]) -> list[int | None]:
        """The row of each person; None without a profile."""
        return [None if name is None else self.index.find(name) for name in people]

    def _offsets(self, people: Sequence[str | None], rows: Sequence[int | None]) -> Tensor:
        """The offset of each person, ``[n, C]``."""
        found = torch.zeros(len(rows), len(self.head.labels))
        offset_bits = self.bank.content().offset_bits
        known = [place for place, row in enumerate(rows) if row is not None]
        if offset_bits is not None and known:
            found[known] = unpack_halves(offset_bits[[rows[place] for place in known]])
        return found

    @torch.inference_mode()
    def _logits(self, texts: Sequence[str], rows: Tensor, batch_size: int) -> Iterator[Tensor]:
        for start in range(0, len(texts), batch_size):
            some = slice(start, start + batch_size)
            batch = self.tokenizer(
                list(texts[some]), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            ).to(self.model.device)
            yield self.model(**batch, adapter_names=rows[some].to(self.model.device)).logits.float().cpu()

    def _prediction(self, logits: Tensor, who: str | None, personal: bool) -> Prediction:
        names = self.head.labels
        if self.head.problem_type == "regression":
            return Prediction(None, {names[0]: float(logits[0])}, who, personal)
        if self.head.problem_type == "multi_label_classification":
            shares = dict(zip(names, logits.sigmoid().tolist(), strict=True))
            likely = tuple(name for name, share in shares.items() if share > 0.5)
            return Prediction(likely, shares, who, personal)
        shares = dict(zip(names, logits.softmax(-1).tolist(), strict=True))
        return Prediction(max(shares, key=shares.__getitem__), shares, who, personal)


def head_of(bank: ProfileBank) -> Classifier:
    """Pooling and label names of a bank's head.

    Raises:
        ConfigError: they are not recorded.
    """
    if str(getattr(bank.config.task_type, "value", bank.config.task_type)) == "CAUSAL_LM":
        raise ConfigError(
            "The bank is one of a language model, which has no labels to give. Ask it with `peft-xmask predict` or "
            "peft_xmask.people.writer.Writer, and serve it with vLLM (docs/works-with.md)."
        )
    if bank.config.classifier is None:
        raise ConfigError(
            "The bank does not record its label names and how its head pools, so its answers cannot be read. Make the "
            "bank with `peft-xmask personalize`, or from adapters that `peft-xmask train` wrote."
        )
    return Classifier.from_fields(bank.config.classifier)


def is_bank(path: Path) -> bool:
    """Whether a folder may hold a bank."""
    return (path / "adapter_config.json").is_file()
