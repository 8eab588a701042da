"""A run with texts alone: one adapter for all people over a causal language model, then a mask for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..bank.bank import ProfileBank
from ..errors import ConfigError
from ..integrations.pooled_classifier import load_tokenizer
from ..pool import AdapterPool
from .examples import PeopleExamples, Row
from .masks import fit_directions, train_masks
from .report import Layer, few_of, layer_of
from .settings import Execution, PersonalizeSettings
from .strength import choose_strength
from .table import CAUSAL_LM, PeopleTable
from .tokens import TokenLosses, encode, token_losses


class LanguageRun:
    """The parts of a run: the examples, and the model as far as it is trained."""

    def __init__(
        self,
        base: str | Path,
        table: PeopleTable,
        settings: PersonalizeSettings,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
    ) -> None:
        self.base, self.table, self.settings = base, table, settings
        self.tokenizer, self.model = tokenizer, model
        rows = {
            part: [
                {**encode(tokenizer, each.text, str(each.label), settings.max_length), "user": each.who}
                for each in examples
            ]
            for part, examples in table.parts.items()
        }
        self.examples = PeopleExamples(table, rows, settings.min_labels)
        self.strength = 0.0

    @classmethod
    def prepare(cls, base: str | Path, table: PeopleTable, settings: PersonalizeSettings) -> LanguageRun:
        """Load the base and tokenise the texts.

        Raises:
            ConfigError: the base is no causal language model, or nobody has enough training examples.
        """
        set_seed(settings.seed)
        return cls(base, table, settings, load_tokenizer(base), load_language_model(base))

    @property
    def people(self) -> list[str]:
        """Names of those who get a profile."""
        return self.examples.people

    def fit_pool(self, how: Execution) -> AdapterPool:
        """A pool fitted to these people."""
        collator = DataCollatorForTokenClassification(self.tokenizer)
        return fit_directions(self.model, self.examples, "CAUSAL_LM", self.settings, how, data_collator=collator)

    def train(self, how: Execution) -> ProfileBank:
        """Train the common adapter and the masks, and keep the masks at the strength that validation favours."""
        has_common = how.pool is not None and how.pool.common is not None
        size = 0 if has_common else self.settings.common_size
        known = self.examples.labels
        trained = train_masks(
            self.model,
            self.examples.rows["train"],
            [row for row in self.examples.rows["validation"] if row["user"] in known],
            "CAUSAL_LM",
            self.settings,
            how,
            data_collator=DataCollatorForTokenClassification(self.tokenizer),
            head=None if size else "frozen",
            common_size=size,
            common_epochs=self.settings.common_epochs,
        )
        bank = trained.select(self.people)
        validation = self.examples.mine("validation") if self.settings.epochs else torch.empty(0, dtype=torch.long)
        plain = self._losses(bank, "validation", shared=True).nats[validation]
        chosen = choose_strength(
            bank, plain, lambda candidate, _: self._losses(candidate, "validation").nats[validation]
        )
        self.strength = chosen.value
        chosen.bank.config.training = {
            **(bank.config.training or {}), "task": CAUSAL_LM, "people": len(bank), "mask_strength": self.strength,
            "max_length": self.settings.max_length,
        }  # fmt: skip
        return chosen.bank

    def layers(self, bank: ProfileBank) -> tuple[tuple[Layer, ...], int]:
        """What each layer brings on the test examples, and the most texts of a person with few."""
        labels = self.examples.labels
        few = few_of(labels)
        rows = self.examples.rows["test"]
        if not rows:
            return (), few
        people = [row["user"] for row in rows]
        found: list[tuple[str, TokenLosses, int]] = [("base model", self._losses(None, "test"), 0)]
        if bank.config.resolve_pool().common is not None:
            found.append(("common part", self._losses(bank, "test", shared=True), 0))
        if self.strength:
            found.append(("+ mask", self._losses(bank, "test"), bank.nbytes))
        layers = [
            layer_of(name, each.per_token.tolist(), people, labels, few, size, each.tokens.tolist())
            for name, each, size in found
        ]
        return tuple(layers), few

    def _losses(self, bank: ProfileBank | None, part: str, *, shared: bool = False) -> TokenLosses:
        """Losses of the examples of a part under the base alone, or with each person's mask, or with none."""
        examples: Sequence[Row] = self.examples.rows[part]
        base = load_language_model(self.base)
        if bank is None:
            return token_losses(base.eval(), examples, self.tokenizer)
        model: Any = bank.attach(base).eval()
        index = bank.name_index()
        found = [None if shared else index.find(row["user"]) for row in examples]
        numbers: Tensor = torch.tensor([-1 if row is None else row for row in found], dtype=torch.long)
        return token_losses(model, examples, self.tokenizer, numbers)


def load_language_model(base: str | Path) -> PreTrainedModel:
    """A causal language model.

    Raises:
        ConfigError: the base is another kind of model.
        OSError: it cannot be found.
    """
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    try:
        said = getattr(AutoConfig.from_pretrained(base), "architectures", None) or []
        if said and not known.intersection(said):
            raise ValueError(f"its config says that it is a {', '.join(said)}.")
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"The base '{base}' cannot continue texts: {reason[:300]} Expected a causal language model, such as Llama "
            "or GPT-2, for --task causal-lm."
        ) from error
    return model
