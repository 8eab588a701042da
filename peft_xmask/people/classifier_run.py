"""A run with labels or numbers: one head for all people, then an offset and a mask for each of them."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, set_seed

from ..bank.bank import ProfileBank
from ..core.packing import pack_halves, unpack_halves
from ..errors import ConfigError
from ..integrations.pooled_classifier import (
    MeanPooledClassifier,
    PooledClassifierConfig,
    load_classifier,
    load_tokenizer,
)
from ..pool import AdapterPool
from ..training.evaluation import label_losses
from ..training.offset_prior import VARIANCES, likeliest_variance
from ..training.offsets import SharedOutputs, fit_offsets
from ..tuners.base.classifier import Classifier
from .common import SharedStates, fit_head
from .examples import PeopleExamples, Row, by_length, encode_texts, inputs_of
from .masks import fit_directions, train_masks
from .offsets import without_offsets
from .report import Layer, few_of, layer_of
from .settings import Execution, PersonalizeSettings
from .strength import choose_strength
from .table import PROBLEMS, PeopleTable

_ROUNDS = 2  # of the head given the offsets, and the offsets given the head


class ClassifierRun:
    """The parts of a run: the examples, and the model as far as it is trained."""

    def __init__(
        self,
        base: str | Path,
        table: PeopleTable,
        settings: PersonalizeSettings,
        tokenizer: PreTrainedTokenizerBase,
        model: MeanPooledClassifier,
    ) -> None:
        self.base, self.table, self.settings = base, table, settings
        self.tokenizer, self.model = tokenizer, model
        rows = {part: encode_texts(tokenizer, table, each, settings.max_length) for part, each in table.parts.items()}
        self.examples = PeopleExamples(table, rows, settings.min_labels)
        self.targets = {part: _targets(table, each) for part, each in rows.items()}
        self.alone: dict[str, Tensor] = {}  # outputs of the head that is best without offsets
        self.common: dict[str, Tensor] = {}  # of the head that is best with them
        self.offsets = torch.zeros(len(self.examples.people), len(table.labels))
        self.mask_offsets = self.offsets
        self.variance = self.strength = 0.0

    @classmethod
    def prepare(cls, base: str | Path, table: PeopleTable, settings: PersonalizeSettings) -> ClassifierRun:
        """Load the base and tokenise the texts.

        Raises:
            ConfigError: the base cannot do the task, or nobody has enough training examples.
        """
        set_seed(settings.seed)
        head = Classifier(table.labels, "mean", settings.max_length, PROBLEMS[table.task])
        try:
            tokenizer = load_tokenizer(base)
            model: Any = load_classifier(base, PooledClassifierConfig.of(head))
        except (ValueError, AttributeError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"The base '{base}' cannot do {table.task} of texts: {reason[:300]} Expected a text encoder or decoder "
                "that transformers' AutoModel loads, with its tokenizer."
            ) from error
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        return cls(base, table, settings, tokenizer, model)

    @property
    def people(self) -> list[str]:
        """Names of those who get a profile."""
        return self.examples.people

    def fit_pool(self, how: Execution) -> AdapterPool:
        """A pool fitted to these people. The head that is trained with it is not kept: another one is fitted."""
        return fit_directions(
            copy.deepcopy(self.model),
            self.examples,
            "SEQ_CLS",
            self.settings,
            how,
            processing_class=self.tokenizer,
        )

    def train(self, how: Execution) -> ProfileBank:
        """Train the head, the offsets and the masks, and keep the masks at the strength that validation favours."""
        self._fit_common(how)
        return self._choose_strength(self._train_masks(how))

    def layers(self, bank: ProfileBank) -> tuple[tuple[Layer, ...], int]:
        """What each layer brings on the test examples, and the most labels of a person with few."""
        labels = self.examples.labels
        few = few_of(labels)
        rows = self.examples.rows["test"]
        if not rows:
            return (), few
        people = [row["user"] for row in rows]
        offset = self.common["test"] + self._added(self.offsets, "test")
        found = [
            ("one answer for all texts", _constant(self.table).expand(len(rows), -1), 0),
            ("common part", self.alone["test"], 0),
            ("+ offset", offset, 2 * len(self.table.labels)),
        ]
        if self.strength:
            masked = self._logits(bank, ("test",))["test"]
            found.append(("+ mask", masked + self._added(self.mask_offsets, "test"), bank.nbytes))
        layers = [
            layer_of(name, _scores(self.table.task, logits, self.targets["test"]), people, labels, few, size)
            for name, logits, size in found
        ]
        return tuple(layers), few

    def _fit_common(self, how: Execution) -> None:
        """The head, and offsets given the head, in turns."""
        rows, count = self.examples.rows, len(self.table.labels)
        with SharedStates(self.model, self.tokenizer, how.pool) as shared:
            states = {part: shared.of(each) for part, each in rows.items()}
        added = {part: torch.zeros(len(each), count) for part, each in rows.items()}
        for number in range(_ROUNDS):
            parts = [(states[part], self.targets[part], added[part]) for part in ("train", "validation")]
            fit_head(self.model, *parts)
            with torch.no_grad():
                self.common = {part: self.model.classifier(each).float() for part, each in states.items()}
            if number == 0:
                self.alone = self.common
            self.variance, self.offsets = self._offsets(self.common, self.variance or None)
            added = {part: self._added(self.offsets, part) for part in rows}
        self.mask_offsets = self.offsets

    def _train_masks(self, how: Execution) -> ProfileBank:
        """A row of masks for each person, with the head as it is; of a regression, for what the offsets leave."""
        bank = train_masks(
            self.model,
            self._for_masks("train"),
            self._for_masks("validation"),
            "SEQ_CLS",
            self.settings,
            how,
            processing_class=self.tokenizer,
            head="frozen",
        )
        head = Classifier(self.table.labels, "mean", self.settings.max_length, PROBLEMS[self.table.task])
        bank.config.classifier = head.to_fields()
        return bank

    def _choose_strength(self, bank: ProfileBank) -> ProfileBank:
        """The bank with its gains at the strength that validation favours, and with offsets."""
        validation = self.examples.mine("validation") if self.settings.epochs else torch.empty(0, dtype=torch.long)
        offsets = {0.0: self.offsets}

        def masked(candidate: ProfileBank, value: float) -> Tensor:
            logits = self._logits(candidate, ("train", "validation"))
            _, offsets[value] = self._offsets(logits, self.variance or None)
            return self._losses(logits["validation"], offsets[value], "validation")[validation]

        plain = self._losses(self.common["validation"], self.offsets, "validation")[validation]
        chosen = choose_strength(bank, plain, masked)
        self.strength, self.mask_offsets = chosen.value, offsets[chosen.value]
        bank, content = chosen.bank, chosen.bank.content()
        order = {name: number for number, name in enumerate(self.people)}
        offset_bits = pack_halves(self.mask_offsets)[[order[name] for name in bank]]
        bank.config.training = {
            **(bank.config.training or {}),
            "people": len(bank), "mask_strength": self.strength, "offset_variance": self.variance,
        }  # fmt: skip
        return ProfileBank(bank.config, content.bits, content.gain_bits, list(bank), content.shared, offset_bits)

    def _for_masks(self, part: str) -> list[Row]:
        found = self.examples.of_people(part)
        if self.table.task != "regression":
            return found
        offsets = self._added(self.offsets, part)[self.examples.mine(part), 0].tolist()
        return [{**row, "labels": row["labels"] - offset} for row, offset in zip(found, offsets, strict=True)]

    def _added(self, offsets: Tensor, part: str) -> Tensor:
        """The offset of each example's person, ``[n, C]``; zero for the others."""
        numbers = self.examples.numbers[part]
        return torch.where(numbers.view(-1, 1) >= 0, offsets[numbers.clamp_min(0)], 0.0)

    def _offsets(self, logits: Mapping[str, Tensor], variance: float | None) -> tuple[float, Tensor]:
        """The prior's variance, chosen unless it is given, and offsets as they are stored."""
        mine = self.examples.mine("train")
        shared, rows = SharedOutputs(logits["train"], self.targets["train"])[mine], self.examples.numbers["train"][mine]
        if variance is None:
            variance = likeliest_variance(shared, rows, (0.0, *VARIANCES)) if len(rows) else 0.0
        return variance, unpack_halves(pack_halves(fit_offsets(shared, rows, len(self.people), variance)))

    def _losses(self, logits: Tensor, offsets: Tensor, part: str) -> Tensor:
        return label_losses(logits + self._added(offsets, part), self.targets[part])

    @torch.no_grad()
    def _logits(self, bank: ProfileBank, parts: Sequence[str]) -> dict[str, Tensor]:
        """Outputs with each person's mask, without offsets."""
        head = Classifier.from_fields(bank.config.classifier or {})
        base: Any = load_classifier(self.base, PooledClassifierConfig.of(head))
        base.config.pad_token_id = self.model.config.pad_token_id
        served = without_offsets(bank).attach(base).eval()
        index = bank.name_index()
        collate = DataCollatorWithPadding(self.tokenizer)
        found = {}
        for part in parts:
            examples = self.examples.rows[part]
            rows = [index.find(row["user"]) for row in examples]
            numbers = torch.tensor([-1 if row is None else row for row in rows], dtype=torch.long)
            found[part] = torch.empty(len(examples), len(self.table.labels))
            for some in by_length(examples):
                inputs = collate([inputs_of(examples[place]) for place in some])
                batch = {name: each.to(served.device) for name, each in inputs.items()}
                logits = served(**batch, adapter_names=numbers[some].to(served.device)).logits
                found[part][torch.tensor(some)] = logits.float().cpu()
        return found


def _targets(table: PeopleTable, rows: Sequence[Mapping[str, Any]]) -> Tensor:
    values = [row["labels"] for row in rows]
    if table.task == "multi-label":
        return torch.tensor(values, dtype=torch.float).view(len(rows), len(table.labels))
    return torch.tensor(values, dtype=torch.float if table.task == "regression" else torch.long)


def _constant(table: PeopleTable) -> Tensor:
    """Outputs ``[1, C]`` of the best answer that looks at nothing."""
    train = table.parts["train"]
    if table.task == "regression":
        return torch.tensor([[statistics.median(float(example.label) for example in train)]])  # type: ignore[arg-type]
    counts = torch.zeros(1, len(table.labels))
    for example in train:
        for number in example.label if isinstance(example.label, tuple) else (int(example.label),):
            counts[0, number] += 1
    return counts - len(train) / 2 if table.task == "multi-label" else counts


def _scores(task: str, logits: Tensor, targets: Tensor) -> list[float]:
    """Of each example: whether the label is right, the share of labels that are, or the absolute error."""
    if task == "regression":
        found = (logits.view(-1) - targets).abs()
    elif task == "multi-label":
        found = ((logits > 0) == (targets > 0.5)).float().mean(1)
    else:
        found = (logits.argmax(-1) == targets).float()
    return [float(value) for value in found]
