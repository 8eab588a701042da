"""Hidden states of a dataset before a model's first adapted block, kept on disk, so that each is computed only once.

A cache is a folder with two files. ``states.bin`` holds the states of one example after the other, ``[tokens, d]``
each, in the model's dtype and the machine's byte order. ``index.safetensors`` says where each example's states begin
(``starts``) and how many tokens it has (``lengths``); its metadata says what the states are of. It is written last:
without it the folder holds no cache.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.files import dtype_from_name, dtype_name, read_tensors, write_tensors
from ..errors import ConfigError, FileFormatError
from . import distributed as ranks
from .checkpoints import difference
from .data import by_length
from .prefix import Prefix

STATES = "prefix_states"
"""Name of the states among the columns of an example and the arguments of the model."""
DATA_FILE, INDEX_FILE = "states.bin", "index.safetensors"
_PROBES = 4
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of the relative difference between a probe's states and those that were kept: another machine rounds differently."""

Collator = Callable[[list[dict[str, Any]]], Any]


class PrefixStates:
    """The states of a dataset's examples.

    Args:
        folder: of the cache.
        starts: long ``[n]``, the first token of each example.
        lengths: long ``[n]``, the tokens of each example.
        width: d.
        dtype: of the states.
        keeps: kept alive as long as the states are.

    Raises:
        FileFormatError: the file has another size than the index says.
    """

    def __init__(
        self, folder: Path, starts: Tensor, lengths: Tensor, width: int, dtype: torch.dtype, keeps: object = None
    ) -> None:
        path, total = folder / DATA_FILE, int(lengths.sum())
        found = path.stat().st_size if path.is_file() else 0
        if found != total * width * dtype.itemsize:
            raise FileFormatError(
                f"Expected {total * width * dtype.itemsize} bytes in '{path}', as its index says, found {found}. "
                f"Delete '{folder}' and run again: the states will be computed anew."
            )
        self._states = torch.from_file(str(path), shared=False, size=total * width, dtype=dtype).view(total, width)
        self._starts, self._lengths, self._keeps = starts, lengths, keeps

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, place: int) -> Tensor:
        """States of one example, ``[tokens, d]``."""
        start = int(self._starts[place])
        return self._states[start : start + int(self._lengths[place])]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self._states.nbytes


class ExamplesWithStates:
    """A dataset whose examples have their states in the column :data:`STATES`."""

    def __init__(self, dataset: Any, states: PrefixStates) -> None:
        self.dataset, self.states = dataset, states

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return {**self.dataset[place], STATES: self.states[place]}


class StatesCollator:
    """Puts the states of examples beside what another collator makes of them, at the places of their tokens.

    Args:
        collator: drops columns that the model does not take.
    """

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __call__(self, features: Sequence[dict[str, Any]]) -> Any:
        """The other collator's batch with ``[B, T, d]`` states, which are zero where there is padding."""
        batch = self.collator([{key: each[key] for key in each if key != STATES} for each in features])
        if all(STATES in each for each in features):
            batch[STATES] = _laid_out([each[STATES] for each in features], batch.get("attention_mask"))
        return batch


@contextmanager
def replaying(model: nn.Module, prefix: Prefix | None) -> Iterator[None]:
    """Within it, a forward pass that is given states as ``prefix_states`` skips the prefix.

    Args:
        prefix: None: nothing is changed.
    """
    if prefix is None:
        yield
        return
    running: list[Any] = []

    def begin(module: nn.Module, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        replay = prefix.replayed(named.get(STATES))
        replay.__enter__()
        running.append(replay)
        return args, {key: named[key] for key in named if key != STATES}

    def end(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    hooks = [
        model.register_forward_pre_hook(begin, with_kwargs=True),
        model.register_forward_hook(end, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class StatesRecorder:
    """Computes states, or finds those that an earlier run kept.

    Args:
        model: in which the prefix is; evaluated without an adapter.
        prefix: whose states are kept.
        collator: makes batches of examples.
        batch_size: examples in a forward pass.
        facts: what the states depend on, in types that JSON has.
    """

    def __init__(
        self, model: nn.Module, prefix: Prefix, collator: Collator, batch_size: int, facts: Mapping[str, Any]
    ) -> None:
        self.model, self.prefix, self.collator, self.batch_size = model, prefix, collator, batch_size
        self.facts = {"blocks": len(prefix.blocks), **facts}

    def obstacle(self, dataset: Any) -> str | None:
        """Why the states of a dataset cannot be kept; None: they can."""
        examples = [dataset[place] for place in range(min(2, len(dataset)))]
        first, again = self.collator(examples), self.collator(examples)
        if any(not _equal(first[key], again[key]) for key in first):
            return "the collator makes another batch of the same examples each time"
        states = self._run(first, skip=False)
        if states is None:
            return "the model's blocks return more than hidden states"
        if states.requires_grad:
            return "something before the first adapted block is trained"
        return None

    def states(self, dataset: Any, folder: Path | None, examples: str) -> PrefixStates:
        """The states of a dataset.

        Args:
            folder: where they are kept; None: in a temporary folder.
            examples: fingerprint of the dataset.

        Raises:
            ConfigError: the folder has states of other data or of another base.
        """
        facts = {**self.facts, "examples": examples}
        if folder is None:
            beside = tempfile.TemporaryDirectory(prefix="peft-xmask-", ignore_cleanup_errors=True)
            self._record(dataset, Path(beside.name), facts)
            return self._open(Path(beside.name), facts, keeps=beside)
        device = next(self.model.parameters()).device
        if not (folder / INDEX_FILE).is_file() and ranks.number() == 0:
            self._record(dataset, folder, facts)
        ranks.total(torch.zeros(1), device)  # the others wait
        found = self._open(folder, facts)
        self._check(dataset, found, folder)
        return found

    def _record(self, dataset: Any, folder: Path, facts: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX_FILE).unlink(missing_ok=True)
        starts, lengths = torch.zeros(len(dataset), dtype=torch.long), torch.zeros(len(dataset), dtype=torch.long)
        total, shape = 0, None
        with (folder / DATA_FILE).open("wb") as stream:
            for places in by_length(dataset, torch.arange(len(dataset))).split(self.batch_size):
                for place, states in zip(places.tolist(), self._of(dataset, places), strict=True):
                    starts[place], lengths[place] = total, len(states)
                    total += len(states)
                    shape = states.shape[1], states.dtype
                    stream.write(states.contiguous().view(torch.uint8).numpy().data)
        assert shape is not None
        notes = {"facts": json.dumps({**facts, "width": shape[0], "dtype": dtype_name(shape[1])})}
        write_tensors(folder / INDEX_FILE, {"starts": starts, "lengths": lengths}, notes)

    def _open(self, folder: Path, facts: Mapping[str, Any], keeps: object = None) -> PrefixStates:
        tensors, metadata = read_tensors(folder / INDEX_FILE)
        try:
            found = json.loads(metadata["facts"])
            width, dtype = found.pop("width"), dtype_from_name(found.pop("dtype"))
            starts, lengths = tensors["starts"], tensors["lengths"]
        except (KeyError, ValueError) as error:
            raise FileFormatError(
                f"'{folder / INDEX_FILE}' is not the index of a cache of states. Delete '{folder}', or name another "
                "folder."
            ) from error
        if found != dict(facts):
            raise ConfigError(
                f"'{folder}' holds the states of another run: {difference(found, facts)}. Name another folder as "
                "cache=, or delete this one if it is no longer needed."
            )
        return PrefixStates(folder, starts, lengths, width, dtype, keeps)

    def _check(self, dataset: Any, found: PrefixStates, folder: Path) -> None:
        """Compute the states of a few examples again: fingerprints do not see every change of a base."""
        places = torch.linspace(0, len(dataset) - 1, min(_PROBES, len(dataset))).long()
        for place, states in zip(places.tolist(), self._of(dataset, places), strict=True):
            kept = found[place]
            far = kept.shape != states.shape or float(
                (kept.float() - states.float()).norm() / states.float().norm().clamp_min(1e-30)
            ) > _TOLERANCE.get(states.dtype, 1e-3)
            if far:
                raise ConfigError(
                    f"'{folder}' holds states that the base does not compute from example {place}: they are of another "
                    "base or tokenizer. Name another folder as cache=, or delete this one if it is no longer needed."
                )

    def _of(self, dataset: Any, places: Tensor) -> list[Tensor]:
        """States of some examples on the CPU, ``[tokens, d]`` each."""
        batch = self.collator([dataset[place] for place in places.tolist()])
        states = self._run(batch, skip=True)
        assert states is not None
        states, mask = states.cpu(), _token_mask(batch.get("attention_mask"), states)
        return [each if mask is None else each[mask[number]] for number, each in enumerate(states)]

    def _run(self, batch: Mapping[str, Any], *, skip: bool) -> Tensor | None:
        device = next(self.model.parameters()).device
        given = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor) and key != "labels"}
        if "adapter_names" in given:
            given["adapter_names"] = torch.full_like(given["adapter_names"], -1)
        training = self.model.training
        self.model.eval()
        try:
            return self.prefix.record(self.model, given, skip=skip, gradient=not skip)
        finally:
            self.model.train(training)


def _laid_out(states: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Shapes: ``[tokens, d]`` each -> ``[B, T, d]``, zero where ``mask [B, T]`` is."""
    if mask is None or mask.dim() != 2 or mask.sum(1).tolist() != [len(each) for each in states]:
        return torch.stack(list(states))
    laid = states[0].new_zeros(*mask.shape, states[0].shape[1])
    laid[mask.bool()] = torch.cat(list(states))
    return laid


def _token_mask(mask: Tensor | None, states: Tensor) -> Tensor | None:
    """Which states are those of tokens, bool ``[B, T]``; None: all."""
    return mask.bool().cpu() if mask is not None and mask.shape == states.shape[:2] else None


def _equal(first: Any, again: Any) -> bool:
    return torch.equal(first, again) if isinstance(first, Tensor) and isinstance(again, Tensor) else True
