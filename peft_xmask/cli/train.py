"""``peft-xmask train`` and ``peft-xmask eval``: text classification from a file of labelled texts."""

from __future__ import annotations

import json
import random
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..pool import BOTTLENECK_SIZE, NUM_ADAPTERS
from .console import bytes_text, new_folder, output, print_facts, print_json, progress_bar
from .data import Rows, label_names_of, number_labels, read_rows

if TYPE_CHECKING:
    from .classify import TextClassifier
    from .scores import Evaluation


class Method(str, Enum):
    """Methods that can be trained."""

    xpeft = "xpeft"
    bottleneck = "bottleneck"
    magnitude_mask = "magnitude-mask"
    weight_adapter = "weight-adapter"
    lora = "lora"
    head = "head"


class Pooling(str, Enum):
    """What the head reads."""

    mean = "mean"
    model = "model"


class MaskType(str, Enum):
    """Kinds of mask."""

    hard = "hard"
    soft = "soft"


class Target(str, Enum):
    """What a weight adapter changes."""

    bias = "bias"
    weight = "weight"
    both = "both"


Data = Annotated[str, typer.Option(help="JSON Lines, CSV or Parquet file, or a Hub dataset.")]
Text = Annotated[str, typer.Option(help="Column of the texts.")]
Label = Annotated[str, typer.Option(help="Column of the labels: strings or whole numbers.")]


def train(
    base: Annotated[str, typer.Option(help="Base model: folder or Hub id.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder to write the adapter to.")],
    text: Text = "text",
    label: Label = "label",
    method: Annotated[Method, typer.Option(help="What to train.")] = Method.xpeft,
    split: Annotated[str, typer.Option(help="Split of a Hub dataset.")] = "train",
    eval_data: Annotated[str | None, typer.Option(help="Data to evaluate on afterwards.")] = None,
    eval_split: Annotated[str, typer.Option(help="Split of a Hub dataset to evaluate on.")] = "validation",
    eval_fraction: Annotated[float, typer.Option(help="Share of --data held out, without --eval-data.")] = 0.0,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 3.0,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps; overrides --epochs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples in a step.")] = 32,
    learning_rate: Annotated[float | None, typer.Option(help="Default: by method.")] = None,
    head_learning_rate: Annotated[float, typer.Option(help="Of the head.")] = 3e-2,
    mask_learning_rate: Annotated[float, typer.Option(help="Of X-PEFT's masks.")] = 0.1,
    max_length: Annotated[int, typer.Option(help="Tokens after which a text is cut.")] = 128,
    pooling: Annotated[Pooling, typer.Option(help="Head on mean states, or the model's own.")] = Pooling.mean,
    num_adapters: Annotated[int, typer.Option(help="Adapters in a random pool.")] = NUM_ADAPTERS,
    bottleneck_size: Annotated[
        int | None, typer.Option(help=f"Default: 48 for bottleneck adapters, {BOTTLENECK_SIZE} for a random pool.")
    ] = None,
    pool: Annotated[str | None, typer.Option(help="Saved pool: folder or Hub id. Default: random.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Adapters in a hard mask. Default: half of them.")] = None,
    mask_type: Annotated[MaskType, typer.Option(help="Kind of mask.")] = MaskType.hard,
    lora_rank: Annotated[int, typer.Option(help="Rank of LoRA.")] = 8,
    density: Annotated[float, typer.Option(help="Share of the weights that a magnitude mask trains.")] = 0.005,
    target: Annotated[Target, typer.Option(help="What a weight adapter changes.")] = Target.bias,
    adapter_rank: Annotated[int, typer.Option(help="Width of a weight adapter.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the head, the order of the data and dropout.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints in OUT/checkpoints; 0: none.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in OUT.")] = False,
) -> None:
    """Train an adapter and a head to classify texts; write a plain PEFT adapter folder."""
    from .classify import TextClassifier
    from .methods import LEARNING_RATES, method_config
    from .train_settings import TrainSettings

    folder = new_folder(out, "adapter_config.json")
    settings = TrainSettings(
        max_steps=max_steps,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=LEARNING_RATES[method.value] if learning_rate is None else learning_rate,
        head_learning_rate=head_learning_rate,
        mask_learning_rate=mask_learning_rate,
        checkpoint_every=checkpoint_every,
        seed=seed,
    )
    config = method_config(
        method.value,
        num_adapters=num_adapters,
        bottleneck_size=bottleneck_size,
        pool=pool,
        mask_type=mask_type.value,
        top_k=top_k,
        lora_rank=lora_rank,
        density=density,
        target=target.value,
        adapter_rank=adapter_rank,
    )
    rows = read_rows(data, text, label, split)
    label_names = label_names_of(rows)
    rows, held_out = _split(rows, eval_fraction if eval_data is None else 0.0, seed)
    if eval_data is not None:
        held_out = read_rows(eval_data, text, label, eval_split)
    training = number_labels(rows, label_names, data)
    evaluation = number_labels(held_out, label_names, eval_data or data)

    classifier = TextClassifier.create(
        base, label_names, config, pooling=pooling.value, max_length=max_length, seed=seed
    )
    with progress_bar("training") as step:
        loss = classifier.train(training, settings, checkpoints=folder / "checkpoints", resume=resume, progress=step)
    classifier.save(folder)
    scores = _score(classifier, evaluation) if evaluation else None
    _print_trained(folder, classifier, len(training), loss, scores)


def evaluate(
    adapter: Annotated[Path, typer.Option(help="Folder that `train` wrote.")],
    data: Data,
    text: Text = "text",
    label: Label = "label",
    split: Annotated[str, typer.Option(help="Split of a Hub dataset.")] = "test",
    base: Annotated[str | None, typer.Option(help="Base model. Default: the one the adapter names.")] = None,
    predictions: Annotated[Path | None, typer.Option(help="JSON Lines file to write predictions to.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure accuracy, macro-F1 and loss of a trained adapter."""
    from ..core.files import write_text
    from .classify import TextClassifier

    classifier = TextClassifier.load(adapter, base)
    rows = read_rows(data, text, label, split)
    examples = number_labels(rows, classifier.label_names, data)
    scores = _score(classifier, examples)
    if predictions is not None:
        names = [classifier.label_names[number] for number in scores.predictions]
        records = [
            {"text": one, "label": truth, "predicted": name} for (one, truth), name in zip(rows, names, strict=True)
        ]
        write_text(predictions, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    facts = {"examples": len(rows), "accuracy": scores.accuracy, "macro_f1": scores.macro_f1, "loss": scores.loss}
    if as_json:
        print_json(facts)
    else:
        print_facts({"examples": len(rows), **_score_facts(scores)})


def _split(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    from ..errors import ConfigError

    if not 0.0 <= fraction < 1.0:
        raise ConfigError(f"--eval-fraction {fraction} is invalid: expected a number from 0 to below 1.")
    if fraction == 0.0:
        return rows, []
    shuffled = random.Random(seed).sample(rows, len(rows))
    count = max(1, round(len(rows) * fraction))
    return shuffled[count:], shuffled[:count]


def _score(classifier: TextClassifier, examples: list[tuple[str, int]]) -> Evaluation:
    with progress_bar("evaluating", len(examples)) as step:
        return classifier.evaluate(examples, progress=step)


def _score_facts(scores: Evaluation) -> dict[str, object]:
    return {
        "accuracy": f"{scores.accuracy:.4f}",
        "macro-F1": f"{scores.macro_f1:.4f}",
        "loss": f"{scores.loss:.4f} nats",
    }


def _print_trained(
    folder: Path, classifier: TextClassifier, examples: int, loss: float, scores: Evaluation | None
) -> None:
    from ..tuners.base.profile_size import profile_size

    size = profile_size(folder)
    print_facts(
        {
            "trained on": f"{examples:,} examples, {len(classifier.label_names)} labels",
            "trainable parameters": f"{classifier.trainable_parameters:,}",
            "training loss": f"{loss:.4f} nats (mean over the run)",
            **({} if scores is None else _score_facts(scores)),
            "payload": bytes_text(size.payload_bytes),
            "head": bytes_text(size.head_bytes),
            "file": bytes_text(size.file_bytes),
        }
    )
    output.print(f"Adapter written to {folder}", markup=False, soft_wrap=True)
