"""Which rows serve. This belongs to a forward pass, never to the model, so threads can share one model.

Rows are chosen in two ways:

- ``model(..., adapter_names=rows)``: one row for each example, for this call alone.
- ``model.set_profile(row)``: one row for whole batches, for every later call in the same *context*. A context is what
  :mod:`contextvars` calls so: each thread and each asyncio task has its own.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .mixing import ActiveAdapters


class Masked(Protocol):
    """What is known here of a mask table: whether it trains."""

    training: bool


class Masks(Protocol):
    """What is known here of the masks of one adapter."""

    name: str

    @property
    def row(self) -> int | None:
        """The row that serves whole batches in this context; None if one has to be chosen."""

    def active(self, now: ForwardPass) -> ActiveAdapters:
        """The mixed adapters of a forward pass."""

    def no_profile(self) -> Exception:
        """The error of a pass for which no row was chosen."""


@dataclass(eq=False)
class BatchRows:
    """One row for each example, for one call of a model (which may be many forward passes, as in ``generate``).

    Attributes:
        table: of the model.
        masks: of the adapter whose rows these are.
        rows: long ``[B]``; -1 is a row without a deviation.
        beams: examples that each row stands for.
        last: the mixed adapters of these rows, kept for the next forward pass of the call.
    """

    table: Masked
    masks: Masks
    rows: Tensor
    beams: int = 1
    last: ActiveAdapters | None = None


@dataclass(eq=False)
class ForwardPass:
    """One forward pass of a model, and what was computed for it.

    Attributes:
        table: of the model.
        batch: the rows that were chosen for this call; None: those of ``set_profile``.
        learns: whether gradients were wanted when it began.
        active: mixed adapters by adapter name and by whether gradients were wanted when they were asked for.
        noise: noise on logits, by adapter: drawn once, since a checkpointed block that runs again must see it again.
        outer: the pass during which this one began, such as that of a model that calls another one.
    """

    table: Masked
    batch: BatchRows | None
    learns: bool
    active: dict[tuple[str, bool], ActiveAdapters] = field(default_factory=dict)
    noise: dict[str, Tensor] = field(default_factory=dict)
    outer: ForwardPass | None = None


class _OfThread(threading.local):
    def __init__(self) -> None:  # run in each thread; a graph is guarded by which attributes there are
        self.batch: BatchRows | None = None
        self.now: ForwardPass | None = None


OF_THREAD = _OfThread()
"""What is being run in this thread: a forward pass never leaves its thread. ``torch.compile`` can trace it, while it
cannot trace a context variable."""

_CHOSEN: ContextVar[Mapping[int, int] | None] = ContextVar("peft_xmask_profiles", default=None)
_COUNTER = itertools.count()
_NUMBERED: WeakValueDictionary[int, Masks] = WeakValueDictionary()


def number_of(masks: Masks) -> int:
    """A new number for an adapter, by which contexts remember its row without keeping it alive."""
    number = next(_COUNTER)
    _NUMBERED[number] = masks
    return number


def choose_row(number: int, row: int) -> None:
    """Let a row of an adapter serve whole batches in this context from now on."""
    known = {each: chosen for each, chosen in (_CHOSEN.get() or {}).items() if each in _NUMBERED}
    _CHOSEN.set({**known, number: row})


def chosen_row(number: int) -> int | None:
    """The row that was chosen in this context; None: none was."""
    chosen = _CHOSEN.get()
    return None if chosen is None else chosen.get(number)


@torch.library.custom_op("peft_xmask::chosen_row", mutates_args=())
def row_in_graph(like: Tensor, number: int) -> Tensor:
    """The row of an adapter for ``torch.compile``: asked when a graph runs, by the thread that runs it. Long, ``[1]``.

    Args:
        like: any tensor: an operator without one would be taken for a constant.
        number: of the adapter.
    """
    row = _NUMBERED[number].row
    if row is None:
        raise _NUMBERED[number].no_profile()
    return torch.tensor([row])


@row_in_graph.register_fake
def _(like: Tensor, number: int) -> Tensor:
    return torch.empty(1, dtype=torch.long)
