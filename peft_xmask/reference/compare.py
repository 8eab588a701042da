"""Methods side by side on one base: measured, not looked up."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from ..core.adapter_folder import ADAPTER_FILE
from ..errors import ConfigError
from .card import card_for
from .comparison import Comparison, Row
from .count import stored_bytes, trainable_parameters
from .measure import Spread, flops, forward_pass, peak_bytes, seconds, training_step
from .vocabulary import InsertionForm

Progress = Callable[[int, int], None]
Candidate = PeftConfig | str | Path


@dataclass
class _Runner:
    """A method on its copy of the base, and what has been measured of it."""

    row: Row
    model: nn.Module
    infer: Callable[[], None]
    train: Callable[[], None]


def compare(
    base: nn.Module,
    candidates: Sequence[Candidate],
    *,
    batch: Mapping[str, Tensor] | None = None,
    repeats: int = 7,
    progress: Progress | None = None,
) -> Comparison:
    """Measure methods on one base in one run.

    The result lists trainable parameters, bytes of the saved tensors and of the file, FLOPs per token of a forward
    pass, and the time of a forward pass and of a training step as ratios to the base's own. The base trains all its
    parameters. Methods take turns within each round of timing; times are the median and range over the rounds.

    Args:
        base: a model of transformers. It is copied, never changed.
        candidates: configs, names of adapter folders, or both.
        batch: keyword arguments of a forward pass; None: 4 sequences of 32 random tokens.
        repeats: rounds of timing.
        progress: called with steps done and their total.

    Returns:
        The base's row first, then one row per candidate; the row of a method that does not fit the base gives the
        reason.

    Raises:
        ConfigError: nothing to compare, or ``repeats`` below 1.
    """
    if not candidates or repeats < 1:
        raise ConfigError(f"Expected methods to compare and repeats >= 1, found {len(candidates)} and {repeats}.")
    batch = dict(batch) if batch is not None else _random_batch(base)
    total = len(candidates) + 1 + repeats
    report = progress or (lambda done, of: None)
    runners: list[_Runner] = [_base_runner(base, batch)]
    rows: list[Row | _Runner] = [runners[0]]
    for done, candidate in enumerate(candidates, start=1):
        rows.append(_prepare(base, candidate, batch))
        report(done, total)
    runners = [row for row in rows if isinstance(row, _Runner)]
    _time(runners, repeats, lambda done: report(len(candidates) + 1 + done, total))
    measured = tuple(row.row if isinstance(row, _Runner) else row for row in rows)
    return Comparison(_unique(measured), type(base).__name__, _shape(batch), repeats)


def _prepare(base: nn.Module, candidate: Candidate, batch: Mapping[str, Tensor]) -> _Runner | Row:
    name, method = _names(candidate)
    try:
        return _adapter_runner(base, candidate, batch, Row(name=name, method=method))
    except Exception as error:  # whatever PEFT or a model raises, the other methods are still compared
        return Row(name=name, method=method, error=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _names(candidate: Candidate) -> tuple[str, str]:
    if isinstance(candidate, PeftConfig):
        method = str(getattr(candidate.peft_type, "value", candidate.peft_type))
        return method, method
    return Path(candidate).name, ""


def _base_runner(base: nn.Module, batch: Mapping[str, Tensor]) -> _Runner:
    model = copy.deepcopy(base).requires_grad_(True)
    row = Row(name="base", method="", trainable_parameters=sum(parameter.numel() for parameter in model.parameters()))
    return _runner(row, model, batch)


def _adapter_runner(base: nn.Module, candidate: Candidate, batch: Mapping[str, Tensor], row: Row) -> _Runner:
    model: Any
    if isinstance(candidate, PeftConfig):
        config = copy.deepcopy(candidate)
        model = get_peft_model(_copy(base, config), config)  # type: ignore[arg-type]
    else:
        config = PeftConfig.from_pretrained(str(candidate))
        model = PeftModel.from_pretrained(_copy(base, config), str(candidate), is_trainable=True)  # type: ignore[arg-type]
    saved_whole = getattr(config, "modules_to_save", None) or ()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        row = replace(
            row,
            method=card_for(config).method,
            trainable_parameters=trainable_parameters(model),
            stored_bytes=stored_bytes(Path(folder), saved_whole),
            file_bytes=(Path(folder) / ADAPTER_FILE).stat().st_size,
            load_seconds=_load_seconds(base, config, folder),
        )
    row = replace(row, switch_seconds=_switch_seconds(model, config))
    return _runner(row, model, batch)


def _runner(row: Row, model: nn.Module, batch: Mapping[str, Tensor]) -> _Runner:
    infer, train = forward_pass(model, batch), training_step(model, batch)
    tokens = next(iter(batch.values())).shape[:2].numel()
    counted = flops(model, batch) / tokens
    train()  # the optimizer makes its state in the first step
    return _Runner(replace(row, flops_per_token=counted, peak_bytes=peak_bytes(train)), model, infer, train)


def _copy(base: nn.Module, config: Any) -> nn.Module:
    """A copy that shares the base's numbers, unless the method writes into them."""
    if card_for(config).insertion_form is InsertionForm.IN_PLACE:
        return copy.deepcopy(base)
    shared = [*base.parameters(), *base.buffers()]
    frozen = [tensor.detach() for tensor in shared]
    kept = {
        id(old): nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
        for old, new in zip(shared, frozen, strict=True)
    }
    return copy.deepcopy(base, kept)


def _load_seconds(base: nn.Module, config: Any, folder: str) -> float:
    return min(seconds(_loader(_copy(base, config), folder)) for _ in range(2))


def _loader(base: nn.Module, folder: str) -> Callable[[], Any]:
    return lambda: PeftModel.from_pretrained(base, folder)  # type: ignore[arg-type]


def _switch_seconds(model: Any, config: Any) -> float | None:
    """Time of ``set_adapter`` between two adapters; None for methods of which a model holds one."""
    if not card_for(config).several:
        return None
    try:
        model.add_adapter("other", copy.deepcopy(config))
    except (ValueError, TypeError, NotImplementedError, AttributeError):
        return None
    times = [seconds(lambda name=name: model.set_adapter(name)) for name in ("other", "default") * 3]  # type: ignore[misc]
    model.delete_adapter("other")
    model.set_adapter("default")
    return min(times)


def _time(runners: list[_Runner], repeats: int, report: Callable[[int], None]) -> None:
    """Forward passes and training steps of all methods in turn, one round after another."""
    infer: list[list[float]] = [[] for _ in runners]
    train: list[list[float]] = [[] for _ in runners]
    for done in range(1, repeats + 1):
        order = range(len(runners)) if done % 2 else range(len(runners) - 1, -1, -1)
        for index in order:
            infer[index].append(seconds(runners[index].infer))
            train[index].append(seconds(runners[index].train))
        report(done)
    for runner, own_infer, own_train in zip(runners, infer, train, strict=True):
        runner.row = replace(
            runner.row,
            inference_ratio=Spread.of([own / of_base for own, of_base in zip(own_infer, infer[0], strict=True)]),
            training_ratio=Spread.of([own / of_base for own, of_base in zip(own_train, train[0], strict=True)]),
        )


def _random_batch(base: nn.Module) -> dict[str, Tensor]:
    config: Any = getattr(base, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None:
        raise ConfigError(
            f"No vocabulary size in the config of a {type(base).__name__}. Pass batch, the model's inputs."
        )
    length = min(32, (getattr(config, "max_position_embeddings", None) or 64) // 2)
    tokens = torch.randint(3, vocabulary, (4, length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = tokens[:, : max(1, length // 2)]
    device = next(base.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _shape(batch: Mapping[str, Tensor]) -> tuple[int, ...]:
    return tuple(next(iter(batch.values())).shape)


def _unique(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Rows with names of their own: a second LORA is LORA 2."""
    seen: dict[str, int] = {}
    named = []
    for row in rows:
        seen[row.name] = seen.get(row.name, 0) + 1
        named.append(row if seen[row.name] == 1 else replace(row, name=f"{row.name} {seen[row.name]}"))
    return tuple(named)
