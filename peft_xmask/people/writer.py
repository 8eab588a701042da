"""A personalised language model: continues texts as each person would, and says how likely a text is for them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from ..bank.bank import ProfileBank
from ..errors import ConfigError
from ..integrations.pooled_classifier import load_tokenizer
from .language_run import load_language_model
from .table import CAUSAL_LM
from .tokens import encode, token_losses

MAX_LENGTH = 512
"""Tokens after which a text is cut, where the bank does not say."""


@dataclass(frozen=True)
class Continuation:
    """What follows a text.

    Attributes:
        text: the new text, without the prompt.
        who: the person it was written for; None: nobody.
        personal: whether a profile of theirs wrote it; otherwise the part that all people share did.
    """

    text: str
    who: str | None
    personal: bool


@dataclass(frozen=True)
class Likelihood:
    """How well a model expects a text.

    Attributes:
        nats: negative log-probability of all its tokens.
        tokens: how many these are.
        who: the person it was asked for; None: nobody.
        personal: whether a profile of theirs was used.
    """

    nats: float
    tokens: int
    who: str | None
    personal: bool

    @property
    def nats_per_token(self) -> float:
        """The loss; lower is more likely."""
        return self.nats / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        """``exp(nats_per_token)``."""
        return exp(self.nats_per_token)


class Writer:
    """A bank of a language model on its base, ready to write.

    >>> people = Writer.from_pretrained("bank")
    >>> people.write(["Dear all,"], who="alice", max_new_tokens=40)[0].text

    Args:
        bank: of a causal language model, as ``personalize`` with the task ``causal-lm`` writes it.
        base: the base model, a folder or Hub id. None: the one that the bank names.
        device: where to compute. None: on the CPU.

    Raises:
        ConfigError: a bank of another task, without profiles or without the name of its base.
        OSError: the base cannot be found.
    """

    def __init__(
        self,
        bank: ProfileBank,
        base: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
    ) -> None:
        if not is_language_bank(bank):
            raise ConfigError("The bank has labels or numbers to give, not texts. Ask it with Predictor.")
        where = base or bank.config.base_model_name_or_path
        if not where:
            raise ConfigError("The bank does not name its base model. Pass it (`--base` on the command line).")
        self.bank = bank
        self.tokenizer = load_tokenizer(where)
        self.model: PeftModel = bank.attach(load_language_model(str(where))).eval()
        self.model.to(device or "cpu")
        self.index = bank.name_index()
        self.max_length = int((bank.config.training or {}).get("max_length", MAX_LENGTH))

    @classmethod
    def from_pretrained(
        cls, where: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, **kwargs: Any
    ) -> Writer:
        """Open a bank, in a folder or on the Hub, and put it on its base. Arguments and errors are the class's."""
        return cls(ProfileBank.from_pretrained(where), base, **kwargs)

    @torch.inference_mode()
    def write(
        self,
        texts: Sequence[str],
        who: str | Sequence[str | None] | None = None,
        *,
        max_new_tokens: int = 64,
        batch_size: int = 16,
        **generation: Any,
    ) -> list[Continuation]:
        """Continue each text.

        Args:
            texts: any number of them.
            who: one name for all texts, or one for each; None: nobody.
            max_new_tokens: most tokens to add.
            batch_size: texts in a batch; people may be mixed in it.
            generation: of ``generate``, such as ``do_sample=True``; by default the likeliest token is taken.

        Raises:
            ConfigError: not as many names as texts, or a text that is no string.
        """
        people, rows = self._people(texts, who)
        options = {"do_sample": False, "pad_token_id": self.tokenizer.pad_token_id, **generation}
        found = []
        for start in range(0, len(texts), batch_size):
            some = slice(start, start + batch_size)
            batch = self._left(self._prompts(texts[some]))
            written = self.model.generate(
                **batch, adapter_names=rows[some].to(self.model.device), max_new_tokens=max_new_tokens, **options
            )
            new = written[:, batch["input_ids"].shape[1] :]
            found += self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [
            Continuation(text, name, row >= 0) for text, name, row in zip(found, people, rows.tolist(), strict=True)
        ]

    def score(
        self,
        texts: Sequence[str],
        who: str | Sequence[str | None] | None = None,
        *,
        completions: Sequence[str] | None = None,
    ) -> list[Likelihood]:
        """How likely each text is.

        Args:
            texts: any number of them; with ``completions``, prompts, which are not scored.
            who: one name for all texts, or one for each; None: nobody.
            completions: what follows each prompt.

        Raises:
            ConfigError: not as many names or completions as texts, or a text that is no string.
        """
        people, rows = self._people(texts, who)
        ends = [""] * len(texts) if completions is None else list(completions)
        if len(ends) != len(texts):
            raise ConfigError(f"Expected a completion for each of the {len(texts)} texts, found {len(ends)}.")
        examples = [encode(self.tokenizer, text, end, self.max_length) for text, end in zip(texts, ends, strict=True)]
        found = token_losses(self.model, examples, self.tokenizer, rows)
        facts = zip(found.nats.tolist(), found.tokens.tolist(), people, rows.tolist(), strict=True)
        return [Likelihood(nats, int(tokens), name, row >= 0) for nats, tokens, name, row in facts]

    def _people(self, texts: Sequence[str], who: str | Sequence[str | None] | None) -> tuple[list[str | None], Tensor]:
        """Whose each text is, and their rows; -1: no profile."""
        people = [who] * len(texts) if who is None or isinstance(who, str) else list(who)
        if len(people) != len(texts):
            raise ConfigError(f"Expected a name for each of the {len(texts)} texts, found {len(people)} names.")
        for number, text in enumerate(texts, 1):
            if not isinstance(text, str) or not text:
                raise ConfigError(f"Expected a string that is not empty as text {number}, found {text!r:.60}.")
        found = [None if name is None else self.index.find(name) for name in people]
        return people, torch.tensor([-1 if row is None else row for row in found], dtype=torch.long)

    def _prompts(self, texts: Sequence[str]) -> list[list[int]]:
        end = self.tokenizer.eos_token_id
        prompts: list[list[int]] = self.tokenizer(list(texts))["input_ids"]
        return [(ids[:-1] if len(ids) > 1 and ids[-1] == end else ids)[-self.max_length :] for ids in prompts]

    def _left(self, prompts: Sequence[list[int]]) -> dict[str, Tensor]:
        """A batch padded on the left, where generation needs it."""
        length = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (length - len(each)) + each for each in prompts])
        mask = torch.tensor([[0] * (length - len(each)) + [1] * len(each) for each in prompts])
        return {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}


def is_language_bank(bank: ProfileBank) -> bool:
    """Whether a bank is one of a causal language model."""
    task = bank.config.task_type
    return str(getattr(task, "value", task)) == "CAUSAL_LM" or (bank.config.training or {}).get("task") == CAUSAL_LM
