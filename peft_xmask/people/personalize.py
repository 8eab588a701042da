"""From a table of people to a bank: what all share, then an offset and a mask for each of them, in one run."""

from __future__ import annotations

import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, TrainingArguments, set_seed

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
from ..training.train import train_profiles
from ..tuners.base.classifier import Classifier
from ..tuners.xpeft import XPEFTConfig
from .common import fit_head, pooled_states
from .offsets import choose_variance, fit_offsets, losses, without_offsets
from .report import FEW, MEASURES, Layer, Report, layer_of
from .table import PROBLEMS, Example, PeopleTable

STRENGTHS = (1.0, 0.5, 0.25)
"""How much of the masks' effect is tried."""
_ROUNDS = 2  # of the head given the offsets, and the offsets given the head
Step = Callable[[str], None]
"""Called with what is being done."""


@dataclass(frozen=True)
class PersonalizeSettings:
    """How people's profiles are trained.

    Attributes:
        max_length: tokens after which a text is cut.
        num_adapters: of a random pool.
        bottleneck_size: width of a random pool's adapters.
        layers: how many of the last blocks are adapted; None: all.
        epochs: passes over the data for the masks; 0: offsets alone.
        batch_size: texts in a step.
        mask_learning_rate: of the masks.
        patience: evaluations without improvement after which a person's training stops.
        min_labels: a person with fewer training labels is served by the common part.
        seed: of the masks' start, the order of the data and dropout.

    Raises:
        ConfigError: an invalid value.
    """

    max_length: int = 128
    num_adapters: int = 104
    bottleneck_size: int = 12
    layers: int | None = 2
    epochs: float = 4.0
    batch_size: int = 32
    mask_learning_rate: float = 0.1
    patience: int | None = 2
    min_labels: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"max_length": 3, "num_adapters": 2, "bottleneck_size": 1, "batch_size": 1, "min_labels": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ConfigError(f"{name}={getattr(self, name)!r} is invalid: expected at least {value}.")
        if not self.mask_learning_rate > 0:
            raise ConfigError(f"mask_learning_rate={self.mask_learning_rate!r} is invalid: expected a number above 0.")
        if not self.epochs >= 0:
            raise ConfigError(f"epochs={self.epochs!r} is invalid: expected a number of at least 0.")
        if self.layers is not None and self.layers < 1:
            raise ConfigError(f"layers={self.layers!r} is invalid: expected at least 1, or None for all blocks.")


@dataclass(frozen=True)
class Personalized:
    """A bank of people's profiles, and how good it is.

    Attributes:
        bank: as it was saved.
        report: see :class:`~peft_xmask.people.report.Report`.
    """

    bank: ProfileBank
    report: Report


def personalize(
    base: str | Path,
    table: PeopleTable,
    out: str | Path,
    settings: PersonalizeSettings | None = None,
    *,
    pool: str | AdapterPool = "random",
    resume: bool = False,
    progress: bool = False,
    step: Step | None = None,
) -> Personalized:
    """Train what all people of a table share and a profile for each of them; save them as a bank.

    Layers come one after another, and each is kept only where examples held out say that it helps: the common part, a
    head on the base's mean hidden states, costs a person nothing; an offset is added to its outputs
    (:mod:`~peft_xmask.people.offsets`); a mask changes the states that the head reads. Masks are kept, at one strength
    for all people, if they lower the validation loss by more than its standard error; otherwise their gains are zero.

    Args:
        base: an encoder or decoder for texts, a folder or Hub id. It is not changed.
        table: see :meth:`~peft_xmask.people.table.PeopleTable.read`.
        out: folder of the bank; an earlier bank there is replaced when all is trained. ``OUT-run`` beside it holds the
            checkpoints until then.
        settings: None: the defaults.
        pool: ``"random"``, a saved pool's folder or Hub id, or a pool.
        resume: continue an interrupted run from its last checkpoint; the bank is the same, byte for byte.
        progress: show a bar.
        step: called with what is being done.

    Raises:
        ConfigError: an invalid setting, a base that cannot do the task, or too few labels.
        OSError: the base cannot be found, or the disk is full; an earlier bank is then as it was.
    """
    settings = settings or PersonalizeSettings()
    told = step or (lambda _: None)
    started = time.perf_counter()
    told("loading the base")
    run = _Run.prepare(base, table, settings)
    told("fitting what all people share, and their offsets")
    run.fit_common()
    told(f"training masks for {len(run.people):,} people")
    folder = Path(f"{Path(out)}-run")
    bank = run.train_masks(folder, pool, resume, progress)
    told("comparing the layers on examples held out")
    bank = run.choose_strength(bank)
    layers, few = run.layers(bank)
    bank.save_pretrained(out)
    shutil.rmtree(folder, ignore_errors=True)
    report = Report(
        measure=MEASURES[table.task],
        layers=layers,
        people=len(table.people),
        served_by_common=len(table.people) - len(bank),
        masks=run.strength > 0,
        few_labels=few,
        examples={part: len(examples) for part, examples in table.parts.items()},
        bank_bytes=sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file()),
        seconds=time.perf_counter() - started,
    )
    return Personalized(bank, report)


class _Run:
    """The parts of a run: the data, and the model as far as it is trained."""

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
        self.labels = Counter(example.who for example in table.parts["train"])
        self.people = [name for name, count in self.labels.items() if count >= settings.min_labels]
        if not self.people:
            raise ConfigError(
                f"Expected a person with at least {settings.min_labels} training labels, found none. Lower min_labels, "
                "or give people more labels."
            )
        numbers = {name: number for number, name in enumerate(self.people)}
        self.data = {part: _encoded(tokenizer, table, rows, settings) for part, rows in table.parts.items()}
        self.targets = {part: _targets(table, rows) for part, rows in self.data.items()}
        self.rows = {
            part: torch.tensor([numbers.get(row["user"], -1) for row in rows], dtype=torch.long)
            for part, rows in self.data.items()
        }
        self.alone: dict[str, Tensor] = {}  # outputs of the head that is best without offsets
        self.common: dict[str, Tensor] = {}  # of the head that is best with them
        self.offsets = torch.zeros(len(self.people), len(table.labels))
        self.mask_offsets = self.offsets
        self.variance = self.strength = 0.0
        self.masked: dict[str, Tensor] = {}

    @classmethod
    def prepare(cls, base: str | Path, table: PeopleTable, settings: PersonalizeSettings) -> _Run:
        """Load the base and tokenise the texts."""
        tokenizer = load_tokenizer(base)
        set_seed(settings.seed)
        head = Classifier(table.labels, "mean", settings.max_length, PROBLEMS[table.task])
        try:
            model: Any = load_classifier(base, PooledClassifierConfig.of(head))
        except (ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"The base '{base}' cannot do {table.task} of texts: {reason[:300]}") from error
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        return cls(base, table, settings, tokenizer, model)

    def fit_common(self) -> None:
        """The head, and offsets given the head, in turns."""
        states = {part: pooled_states(self.model, rows, self.tokenizer) for part, rows in self.data.items()}
        added = {part: torch.zeros(len(rows), len(self.table.labels)) for part, rows in self.data.items()}
        for number in range(_ROUNDS):
            parts = [(states[part], self.targets[part], added[part]) for part in ("train", "validation")]
            fit_head(self.model, self.table.task, *parts)
            with torch.no_grad():
                self.common = {part: self.model.classifier(each).float() for part, each in states.items()}
            if number == 0:
                self.alone = self.common
            self.variance, self.offsets = self._offsets(self.common, self.variance or None)
            added = {part: self._added(self.offsets, part) for part in self.data}
        self.mask_offsets = self.offsets

    def train_masks(self, folder: Path, pool: str | AdapterPool, resume: bool, progress: bool) -> ProfileBank:
        """A row of masks for each person, with the head as it is; of a regression, for what the offsets leave."""
        args = TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=self.settings.batch_size,
            per_device_eval_batch_size=64, num_train_epochs=max(self.settings.epochs, 0.01), learning_rate=1e-2,
            save_strategy="epoch", save_total_limit=2, seed=self.settings.seed, report_to=[],
            use_cpu=not torch.cuda.is_available(), logging_strategy="no",
        )  # fmt: skip
        bank = train_profiles(
            self.model,
            self._for_masks("train"),
            validation=self._for_masks("validation") or None,
            config=self._config(pool),
            args=args,
            processing_class=self.tokenizer,
            head="frozen",
            mask_learning_rate=self.settings.mask_learning_rate,
            patience=self.settings.patience,
            example_loss=_multi_label_losses if self.table.task == "multi-label" else None,
            resume=resume,
            progress=progress,
        )
        head = Classifier(self.table.labels, "mean", self.settings.max_length, PROBLEMS[self.table.task])
        bank.config.classifier = head.to_fields()
        return bank

    def choose_strength(self, bank: ProfileBank) -> ProfileBank:
        """The bank with its gains at the strength that validation favours, and with offsets."""
        validation = self._mine("validation")
        plain = self._losses(self.common["validation"], self.offsets, "validation")[validation]
        best = 0.0
        chosen = _scaled(bank, 0.0)
        for strength in STRENGTHS if len(validation) and self.settings.epochs else ():
            scaled = _scaled(bank, strength)
            logits = self._logits(scaled, ("train", "validation"))
            _, offsets = self._offsets(logits, self.variance or None)
            gains = plain - self._losses(logits["validation"], offsets, "validation")[validation]
            gain = float(gains.mean())
            error = float(gains.std()) / max(1, len(gains)) ** 0.5
            if gain > error and gain > best:
                best, chosen, self.strength, self.mask_offsets = gain, scaled, strength, offsets
        content = chosen.content()
        offset_bits = pack_halves(self.mask_offsets)
        order = {name: number for number, name in enumerate(self.people)}
        offset_bits = offset_bits[[order[name] for name in chosen]]
        config = chosen.config
        config.training = {
            **(config.training or {}),
            "people": len(chosen), "mask_strength": self.strength, "offset_variance": self.variance,
        }  # fmt: skip
        return ProfileBank(config, content.bits, content.gain_bits, list(chosen), content.shared, offset_bits)

    def layers(self, bank: ProfileBank) -> tuple[tuple[Layer, ...], int]:
        """What each layer brings on the test examples, and the most labels of a person with few."""
        rows = self.data["test"]
        few = (
            FEW if any(count <= FEW for count in self.labels.values()) else int(statistics.median(self.labels.values()))
        )
        if not rows:
            return (), few
        people = [row["user"] for row in rows]
        common = self.common["test"]
        offset = common + self._added(self.offsets, "test")
        found = [
            ("one answer for all texts", _constant(self.table).expand(len(rows), -1), 0),
            ("common part", self.alone["test"], 0),
            ("+ offset", offset, 2 * len(self.table.labels)),
        ]
        if self.strength:
            masked = self._logits(bank, ("test",))["test"]
            found.append(("+ mask", masked + self._added(self.mask_offsets, "test"), bank.nbytes))
        layers = [
            layer_of(name, _scores(self.table.task, logits, self.targets["test"]), people, self.labels, few, size)
            for name, logits, size in found
        ]
        return tuple(layers), few

    def _config(self, pool: str | AdapterPool) -> XPEFTConfig:
        settings = self.settings
        chosen: dict[str, Any] = {"num_adapters": settings.num_adapters, "bottleneck_size": settings.bottleneck_size}
        blocks = getattr(self.model.config.get_text_config(), "num_hidden_layers", None)
        if pool != "random":
            chosen = {"pool": pool}
        elif settings.layers is not None and blocks is not None:
            chosen["layers_to_transform"] = list(range(max(0, blocks - settings.layers), blocks))
        return XPEFTConfig(task_type="SEQ_CLS", learn_gain=True, **chosen)

    def _for_masks(self, part: str) -> list[dict[str, Any]]:
        found = [self.data[part][place] for place in self._mine(part).tolist()]
        if self.table.task != "regression":
            return found
        offsets = self._added(self.offsets, part)[self._mine(part), 0].tolist()
        return [{**row, "labels": row["labels"] - offset} for row, offset in zip(found, offsets, strict=True)]

    def _mine(self, part: str) -> Tensor:
        """Places of the examples whose people have a profile."""
        return (self.rows[part] >= 0).nonzero().view(-1)

    def _added(self, offsets: Tensor, part: str) -> Tensor:
        """The offset of each example's person, ``[n, C]``; zero for the others."""
        rows = self.rows[part]
        return torch.where(rows.view(-1, 1) >= 0, offsets[rows.clamp_min(0)], 0.0)

    def _offsets(self, logits: Mapping[str, Tensor], variance: float | None) -> tuple[float, Tensor]:
        """The prior's variance, chosen unless it is given, and offsets as they are stored."""
        task, count = self.table.task, len(self.people)
        parts = []
        for part in ("train", "validation"):
            mine = self._mine(part)
            parts.append((logits[part][mine], self.targets[part][mine], self.rows[part][mine]))
        if variance is None:
            variance = choose_variance(task, parts[0], parts[1], count)
        return variance, unpack_halves(pack_halves(fit_offsets(task, *parts[0], count, variance)))

    def _losses(self, logits: Tensor, offsets: Tensor, part: str) -> Tensor:
        return losses(self.table.task, logits + self._added(offsets, part), self.targets[part])

    @torch.no_grad()
    def _logits(self, bank: ProfileBank, parts: Sequence[str]) -> dict[str, Tensor]:
        """Outputs with each person's mask, without offsets."""
        head = Classifier.from_fields(bank.config.classifier or {})
        base: Any = load_classifier(self.base, PooledClassifierConfig.of(head))
        base.config.pad_token_id = self.model.config.pad_token_id
        served = without_offsets(bank).attach(base).eval()
        index = bank.name_index()
        found = {}
        for part in parts:
            examples = self.data[part]
            rows = [index.find(row["user"]) for row in examples]
            numbers = torch.tensor([-1 if row is None else row for row in rows], dtype=torch.long)
            collate = DataCollatorWithPadding(self.tokenizer)
            order = sorted(range(len(examples)), key=lambda place: len(examples[place]["input_ids"]))
            found[part] = torch.empty(len(examples), len(self.table.labels))
            for start in range(0, len(order), 64):
                some = order[start : start + 64]
                inputs = [_inputs(examples[place]) for place in some]
                batch = {name: each.to(served.device) for name, each in collate(inputs).items()}
                logits = served(**batch, adapter_names=numbers[some].to(served.device)).logits
                found[part][torch.tensor(some)] = logits.float().cpu()
        return found


def _scaled(bank: ProfileBank, strength: float) -> ProfileBank:
    """The bank with its gains multiplied by a number."""
    content = bank.content()
    assert content.gain_bits is not None
    assert content.names is not None
    gains = pack_halves(unpack_halves(content.gain_bits) * strength)
    return ProfileBank(bank.config, content.bits, gains, content.names, content.shared)


def _encoded(
    tokenizer: PreTrainedTokenizerBase, table: PeopleTable, examples: Sequence[Example], settings: PersonalizeSettings
) -> list[dict[str, Any]]:
    if not examples:
        return []
    encoded = tokenizer([each.text for each in examples], truncation=True, max_length=settings.max_length)
    rows = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
    return [
        {**row, "labels": _target(table, example.label), "user": example.who}
        for row, example in zip(rows, examples, strict=True)
    ]


def _inputs(example: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in example.items() if name not in ("labels", "user")}


def _target(table: PeopleTable, label: Any) -> Any:
    if table.task == "multi-label":
        return [float(number in label) for number in range(len(table.labels))]
    return label


def _targets(table: PeopleTable, rows: Sequence[Mapping[str, Any]]) -> Tensor:
    values = [row["labels"] for row in rows]
    if table.task == "multi-label":
        return torch.tensor(values, dtype=torch.float).view(len(rows), len(table.labels))
    return torch.tensor(values, dtype=torch.float if table.task == "regression" else torch.long)


def _multi_label_losses(outputs: Any, batch: Any) -> Tensor:
    labels = batch["labels"].float()
    return F.binary_cross_entropy_with_logits(outputs.logits.float(), labels, reduction="none").mean(1)


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
