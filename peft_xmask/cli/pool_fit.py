"""``peft-xmask pool fit``: from a table with a column of people or tasks to a pool."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import progress_bar
from .personalize import Task

if TYPE_CHECKING:
    from ..people.table import PeopleTable


def fit(
    base: Annotated[str, typer.Option(help="Base model: folder or Hub id.")],
    data: Annotated[str, typer.Option(help="CSV, JSON Lines or Parquet file, or a Hub dataset.")],
    out: Annotated[Path, typer.Option(help="Folder to write the pool to. OUT-run keeps what is finished until then.")],
    text: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    label: Annotated[str, typer.Option(help="Column of the labels.")] = "label",
    profile_column: Annotated[str, typer.Option(help="Column of the people or tasks.")] = "user",
    task: Annotated[Task, typer.Option(help="What is learnt.")] = Task.classification,
    held_out: Annotated[list[str] | None, typer.Option(help="A person or task to leave out. Repeatable.")] = None,
    split: Annotated[str | None, typer.Option(help="Column with train, validation or test.")] = None,
    hub_split: Annotated[str, typer.Option(help="Split of a Hub dataset.")] = "train",
    size: Annotated[int, typer.Option(help="Directions of the pool.")] = 100,
    principal: Annotated[int, typer.Option(help="Principal directions that they are mixtures of.")] = 16,
    bottleneck_size: Annotated[int, typer.Option(help="Width of the adapters.")] = 24,
    layers: Annotated[int | None, typer.Option(help="Adapt the last so many blocks only.")] = None,
    pooling: Annotated[str, typer.Option(help="'mean', or 'model': the architecture's own head.")] = "mean",
    epochs: Annotated[float, typer.Option(help="Passes over the data for the common part.")] = 3.0,
    batch_size: Annotated[int, typer.Option(help="Texts in a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Of the common part.")] = 1e-3,
    max_groups: Annotated[int, typer.Option(help="Most people or tasks that get an adapter of their own.")] = 64,
    min_examples: Annotated[int, typer.Option(help="Least examples of those.")] = 16,
    group_steps: Annotated[int, typer.Option(help="Steps of each of their adapters.")] = 100,
    group_learning_rate: Annotated[float, typer.Option(help="Of their adapters.")] = 1e-3,
    max_length: Annotated[int, typer.Option(help="Tokens after which a text is cut.")] = 128,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
) -> None:
    """Fit a pool to people or tasks: one adapter for what they share, and the directions in which they differ.

    Rows for testing (the newest 20 % of each person or task, unless --split says otherwise) are not read.
    """
    import torch
    from transformers import TrainingArguments

    from ..errors import ConfigError
    from ..people.examples import encode_texts
    from ..people.table import PeopleTable
    from ..pool.storage import JSON_FILE
    from ..training.fit_pool import fit_pool
    from ..training.pool_settings import PoolFitting
    from ..tuners.bottleneck import BottleneckConfig
    from .console import new_folder
    from .pool import save

    if task is Task.causal_lm:
        raise ConfigError(
            "--task causal-lm is not offered by `pool fit`. Expected classification, regression or multi-label. For a "
            "language model, use `peft-xmask personalize --task causal-lm --pool fit`."
        )
    folder = new_folder(out, JSON_FILE)
    working = Path(f"{out}-run")
    with progress_bar("reading the table"):
        table = PeopleTable.read(
            data, text=text, label=label, who=profile_column, task=task.value, split=split, hub_split=hub_split
        )
    model, tokenizer = _model(base, table, pooling, max_length, seed)
    parts = {part: encode_texts(tokenizer, table, table.parts[part], max_length) for part in ("train", "validation")}
    config: dict[str, Any] = {"bottleneck_size": bottleneck_size, "task_type": "SEQ_CLS"}
    if layers is not None:
        blocks = int(model.config.get_text_config().num_hidden_layers)
        config["layers_to_transform"] = list(range(max(0, blocks - layers), blocks))
    args = TrainingArguments(
        output_dir=str(working), per_device_train_batch_size=batch_size, num_train_epochs=epochs,
        learning_rate=learning_rate, save_strategy="epoch", save_total_limit=2, seed=seed, report_to=[],
        logging_steps=10, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    settings = PoolFitting(
        profile_column="user", held_out=tuple(held_out or ()), config=BottleneckConfig(**config), args=args,
        processing_class=tokenizer, size=size, principal=principal, max_groups=max_groups, min_examples=min_examples,
        group_steps=group_steps, group_learning_rate=group_learning_rate, data_name=Path(data).name,
        example_loss=_multi_label_losses if task is Task.multi_label else None,
    )  # fmt: skip
    validation = [row for row in parts["validation"] if row["user"] not in settings.held_out]
    found = fit_pool(model, parts["train"], settings, validation=validation or None, resume=resume)
    save(found.pool, folder)
    shutil.rmtree(working, ignore_errors=True)


def _model(base: str, table: PeopleTable, pooling: str, max_length: int, seed: int) -> tuple[Any, Any]:
    """The base with a fresh head for the table's labels, and its tokenizer."""
    from transformers import set_seed

    from ..integrations.pooled_classifier import load_tokenizer
    from ..people.table import PROBLEMS
    from ..tuners.base.classifier import Classifier
    from .classify import load_base

    tokenizer = load_tokenizer(base)
    set_seed(seed)
    return load_base(base, Classifier(table.labels, pooling, max_length, PROBLEMS[table.task]), tokenizer), tokenizer


def _multi_label_losses(outputs: Any, batch: Any) -> Any:
    from torch.nn import functional as F

    labels = batch["labels"].float()
    return F.binary_cross_entropy_with_logits(outputs.logits.float(), labels, reduction="none").mean(1)
