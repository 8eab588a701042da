"""Text classification with any PEFT method: one base, one adapter, one head, the Hugging Face Trainer.

The command line, the demo and the benchmarks all train through this one class, so that methods differ in their PEFT
config and learning rate and in nothing else.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from ..core.files import write_text
from ..core.fingerprint import digest_of
from ..errors import ConfigError, FileFormatError
from ..integrations.pooled_classifier import (
    PooledClassifierConfig,
    load_classifier,
    load_tokenizer,
    read_classifier,
)
from ..tuners.base.classifier import Classifier
from ..tuners.base.config import TargetConfig
from ..tuners.base.model_card import complete_plain_card
from .scores import Evaluation, accuracy, macro_f1
from .train_settings import TrainSettings

RUN_FILE = "run.json"
"""Beside checkpoints: digests of what the run is of."""

Examples = Sequence[tuple[str, int]]
"""Pairs of a text and a label number."""
Progress = Callable[[int, int], None]
"""Called with the number of steps done and their total."""
MakesOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""Makes an optimizer from parameter groups."""


@dataclass
class TextClassifier:
    """A frozen base with a PEFT adapter and a head, its tokenizer, and the names of its labels.

    Attributes:
        model: the PEFT model.
        tokenizer: of the base.
        label_names: a label number is an index into them.
        pooling: ``"mean"`` (:class:`~peft_xmask.MeanPooledClassifier`) or ``"model"`` (the architecture's own).
        max_length: tokens after which a text is cut.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    label_names: list[str]
    pooling: str = "mean"
    max_length: int = 128

    @classmethod
    def create(
        cls,
        base: str | Path,
        label_names: Sequence[str],
        config: PeftConfig,
        *,
        pooling: str = "mean",
        max_length: int = 128,
        seed: int = 0,
    ) -> TextClassifier:
        """Put a fresh adapter and head on a base; equal seeds give equal heads whatever the method.

        Raises:
            ConfigError: fewer than two labels, or an unknown pooling.
            OSError: the base cannot be found.
        """
        if len(label_names) < 2:
            raise ConfigError(f"Expected at least two labels to tell apart, found {list(label_names)}.")
        if max_length < 3:
            raise ConfigError(
                f"max_length={max_length!r} is invalid: expected at least 3, since a tokenizer's own tokens leave no "
                "room for the text in less."
            )
        head = Classifier(tuple(label_names), pooling, max_length)
        tokenizer = load_tokenizer(base)
        set_seed(seed)
        model = get_peft_model(load_base(base, head, tokenizer), config)
        held = model.peft_config["default"]  # a copy of the config
        if isinstance(held, TargetConfig):
            held.classifier = head.to_fields()
        return cls(model, tokenizer, list(label_names), pooling, max_length)

    @classmethod
    def load(cls, folder: str | Path, base: str | Path | None = None) -> TextClassifier:
        """Read what :meth:`save` wrote, onto ``base`` or the base that the adapter's config names.

        Raises:
            FileFormatError: no adapter, or no readable ``config.json``, in the folder.
            OSError: the base cannot be found.
        """
        folder = Path(folder)
        if not (folder / "adapter_config.json").is_file():
            raise FileFormatError(
                f"Expected an adapter folder with adapter_config.json, found none in '{folder}'. Check the path."
            )
        head = read_classifier(folder)
        base = base or PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
        if not base:
            raise FileFormatError(f"'{folder}' does not name its base model. Pass it (`--base` on the command line).")
        tokenizer = load_tokenizer(base)
        model = PeftModel.from_pretrained(load_base(base, head, tokenizer), str(folder)).eval()
        return cls(model, tokenizer, list(head.labels), head.pooling, head.max_length or 128)

    def save(self, folder: str | Path) -> None:
        """Write a plain PEFT adapter folder whose ``config.json`` has the label names and the pooling."""
        folder = Path(folder)
        self.model.save_pretrained(str(folder))
        config = self.model.peft_config["default"]
        if not isinstance(config, TargetConfig):  # ours write both when they are saved
            Classifier(tuple(self.label_names), self.pooling, self.max_length).write_config(folder)
            complete_plain_card(folder, config)

    @property
    def trainable_parameters(self) -> int:
        """Number of trainable parameters, including the head."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def train(
        self,
        examples: Examples,
        settings: TrainSettings,
        *,
        checkpoints: str | Path | None = None,
        resume: bool = False,
        progress: Progress | None = None,
        optimizer: MakesOptimizer | None = None,
    ) -> float:
        """Train with the Hugging Face Trainer and return the mean training loss, in nats.

        Args:
            examples: pairs of text and label number.
            settings: see :class:`TrainSettings`.
            checkpoints: folder for checkpoints; removed when training ends. Needed if ``settings.checkpoint_every``.
            resume: continue from the last checkpoint in ``checkpoints``, which must be of the same run: the same
                examples, label names, settings and adapter.
            progress: called after each step.
            optimizer: makes it from two groups, the head's and the adapter's, each with its learning rate; None: AdamW
                without weight decay.

        Raises:
            ConfigError: no examples, nothing to resume from, or checkpoints of another run in the folder.
        """
        if not examples:
            raise ConfigError("Expected examples to train on, found none.")
        last = None
        if checkpoints is not None:
            last = _begin(Path(checkpoints), self._identity(examples, settings), resume)
        with tempfile.TemporaryDirectory() as temporary:
            arguments = _training_arguments(settings, str(checkpoints or temporary))
            trainer = Trainer(
                model=self.model,
                args=arguments,
                train_dataset=_Tokenized(self._encode(examples)),
                data_collator=DataCollatorWithPadding(self.tokenizer),
                callbacks=self._callbacks(settings, progress),
                optimizers=((optimizer or adamw)(self._groups(settings)), None),
            )
            trainer.remove_callback(PrinterCallback)
            result = trainer.train(resume_from_checkpoint=last)
        if checkpoints is not None:
            shutil.rmtree(checkpoints, ignore_errors=True)
        self.model.eval()
        return float(result.training_loss)

    def _identity(self, examples: Examples, settings: TrainSettings) -> dict[str, str]:
        """What identifies a run: one digest for each of its parts."""
        content = digest_of(json.dumps(pair, ensure_ascii=False).encode() + b"\n" for pair in examples)
        fields = sorted(self.model.peft_config["default"].to_dict().items())
        adapter = {name: str(sorted(value) if isinstance(value, set) else value) for name, value in fields}
        facts = {
            "label names": [self.label_names, self.pooling, self.max_length],
            "settings": asdict(settings),
            "adapter": {name: value for name, value in adapter.items() if name not in ("training", "logit_scale")},
        }
        digests = {name: digest_of([json.dumps(each, sort_keys=True).encode()]) for name, each in facts.items()}
        return {"examples": content, **digests}

    def _groups(self, settings: TrainSettings) -> list[dict[str, Any]]:
        """What is trained: the head with its own learning rate, the adapter with the other."""
        adapter: list[torch.nn.Parameter] = []
        head: list[torch.nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                (head if ".modules_to_save." in name else adapter).append(parameter)
        groups = [{"params": head, "lr": settings.head_learning_rate or settings.learning_rate}]
        if adapter:
            groups.append({"params": adapter, "lr": settings.learning_rate})
        return groups

    @torch.no_grad()
    def evaluate(self, examples: Examples, *, batch_size: int = 64, progress: Progress | None = None) -> Evaluation:
        """Predict every example, in batches of similar length, and score the predictions.

        Raises:
            ConfigError: no examples.
        """
        if not examples:
            raise ConfigError("Expected examples to evaluate on, found none.")
        self.model.eval()
        encoded = self._encode(examples)
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]["input_ids"]))
        collate = DataCollatorWithPadding(self.tokenizer)
        predictions = [0] * len(encoded)
        loss = 0.0
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = {name: part.to(self.model.device) for name, part in collate([encoded[i] for i in chosen]).items()}
            labels = batch.pop("labels")
            logits = self.model(**batch).logits.float()
            loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            for index, prediction in zip(chosen, logits.argmax(-1).tolist(), strict=True):
                predictions[index] = prediction
            if progress is not None:
                progress(min(start + batch_size, len(order)), len(order))
        labels = [label for _, label in examples]
        return Evaluation(accuracy(labels, predictions), macro_f1(labels, predictions), loss / len(order), predictions)

    def _encode(self, examples: Examples) -> list[dict[str, Any]]:
        encoded = self.tokenizer([text for text, _ in examples], truncation=True, max_length=self.max_length)
        rows = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
        return [{**row, "labels": label} for row, (_, label) in zip(rows, examples, strict=True)]

    def _callbacks(self, settings: TrainSettings, progress: Progress | None) -> list[TrainerCallback]:
        callbacks: list[TrainerCallback] = [] if progress is None else [_ProgressCallback(progress)]
        from ..integrations import RecordCallback, WeightAdapterCallback, XPEFTCallback

        method = self.model.peft_config["default"].peft_type
        if method == "XPEFT":
            return [*callbacks, XPEFTCallback(mask_learning_rate=settings.mask_learning_rate)]
        return [*callbacks, WeightAdapterCallback() if method == "WEIGHT_ADAPTER" else RecordCallback()]


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW without weight decay."""
    return torch.optim.AdamW(groups, weight_decay=0.0)


def load_base(base: str | Path, head: Classifier, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The base model with a fresh head.

    Raises:
        OSError: the base cannot be found.
    """
    model = load_classifier(base, PooledClassifierConfig.of(head))
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


class _Tokenized(torch.utils.data.Dataset[dict[str, Any]]):
    """Tokenized examples as Trainer wants them."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


class _ProgressCallback(TrainerCallback):
    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.progress(state.global_step, state.max_steps)


def _training_arguments(settings: TrainSettings, folder: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        max_steps=-1 if settings.max_steps is None else settings.max_steps,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup,
        save_strategy="steps" if settings.checkpoint_every else "no",
        save_steps=settings.checkpoint_every or 1,
        save_total_limit=1,
        seed=settings.seed,
        train_sampling_strategy="group_by_length",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels"],
    )


def _begin(folder: Path, identity: dict[str, str], resume: bool) -> str | None:
    """The checkpoint to resume from, of this very run; or None, with the folder ready for a new run.

    Raises:
        ConfigError: nothing to resume from, or checkpoints that are there already or of another run.
    """
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    path = folder / RUN_FILE
    if resume:
        if last is None:
            raise ConfigError(
                f"Expected a checkpoint to resume from in '{folder}', found none. Train without resuming."
            )
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        other = [name for name, digest in identity.items() if found.get(name) != digest]
        if other:
            raise ConfigError(
                f"The checkpoints in '{folder}' are of another run: it had other {' and other '.join(other)}. Resume "
                "with the command of that run, or train without resuming into another folder."
            )
        return str(last)
    if last is not None:
        raise ConfigError(
            f"'{folder}' has checkpoints of an earlier run, which would be mixed up with this one's. Pass --resume to "
            "continue that run, or remove the folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(identity, indent=2) + "\n")
    return None
