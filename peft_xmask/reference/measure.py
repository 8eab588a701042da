"""Measurements of one model: FLOPs, memory, times."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing.

    Attributes:
        middle: median.
        low, high: smallest and largest.
    """

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of some values."""
        return cls(median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.low:.2f} to {self.high:.2f})"


class LivePeak(TorchDispatchMode):
    """Counts the bytes of tensors made and still alive, and remembers the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: int = 0
        self.peak: int = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and take note of the storages it made."""
        tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        given = {part.untyped_storage()._cdata for tensor in tensors for part in _parts(tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                for part in _parts(leaf):
                    self._enter(part.untyped_storage(), given)
        return result

    def _enter(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key in self._known or key in given:
            return
        self._known.add(key)
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._leave, key, storage.nbytes())

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The dense tensors that make up a tensor."""
    if tensor.layout is torch.sparse_csr:
        return tensor.values(), tensor.crow_indices(), tensor.col_indices()
    if tensor.layout is torch.sparse_coo:
        return tensor._values(), tensor._indices()
    return (tensor,)


def flops(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Floating point operations of a forward pass, by torch's counter (matrix products and attention)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(**batch)
    return int(counter.get_total_flops())


def training_step(model: nn.Module, batch: Mapping[str, Any]) -> Callable[[], None]:
    """A function that trains one step with AdamW on a loss of the model's first output."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5) if trained else None

    def step() -> None:
        model.train()
        first = next(leaf for leaf in tree_leaves(dict(model(**batch))) if isinstance(leaf, Tensor))
        loss = first.float().square().mean()
        if optimizer is not None:
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return step


def forward_pass(model: nn.Module, batch: Mapping[str, Any]) -> Callable[[], None]:
    """A function that runs the model once, for its outputs."""

    def run() -> None:
        model.eval()
        with torch.no_grad():
            model(**batch)

    return run


def peak_bytes(step: Callable[[], None]) -> int:
    """Most bytes of tensors alive at once that a call made: activations, gradients, optimizer state."""
    with LivePeak() as counter:
        step()
    return int(counter.peak)


def seconds(call: Callable[[], Any]) -> float:
    """Wall-clock time of a call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
