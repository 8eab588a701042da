"""The processes that train together, as ``accelerate launch`` and ``torchrun`` start them; often there is one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from ..errors import ConfigError


def count() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def number() -> int:
    """The number of this process; process 0 writes."""
    return dist.get_rank() if count() > 1 else 0


def total(tensor: Tensor, device: torch.device) -> Tensor:
    """The sum over all processes, bit-identical in each, on the tensor's device.

    Args:
        device: device on which processes communicate.
    """
    if count() == 1:
        return tensor
    found = tensor.to(device, copy=True)
    dist.all_reduce(found)
    return found.to(tensor.device)


def mean_rows(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of any process and, of each, the sum of the values over all processes divided by their number.

    The sums are made in the order of the processes: each gets the same bits.

    Shapes: distinct ``rows [R]``, other ones in each process, and ``values [R, ...]``; as many as there are in all.
    """
    parts = _gathered(rows, values)
    distinct = torch.unique(torch.cat([part for part, _ in parts]))
    summed = values.new_zeros(len(distinct), *values.shape[1:])
    for part, found in parts:
        summed.index_add_(0, torch.searchsorted(distinct, part), found)
    return distinct, summed / count()


def _gathered(rows: Tensor, values: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What each process has, as far as the longest goes padded with zeros, and cut to its length again."""
    lengths = torch.zeros(count(), dtype=torch.long, device=rows.device)
    lengths[number()] = len(rows)
    dist.all_reduce(lengths)
    missing = int(lengths.max()) - len(rows)
    padded = F.pad(rows, (0, missing)), F.pad(values, (*[0] * (2 * values.dim() - 1), missing))
    found = []
    for mine in padded:
        everyone = [torch.empty_like(mine) for _ in range(count())]
        dist.all_gather(everyone, mine.contiguous())
        found.append([each[:length] for each, length in zip(everyone, lengths.tolist(), strict=True)])
    return list(zip(*found, strict=True))


def send_from_first(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Copy the values of process 0 to every process, in place.

    Args:
        device: device on which processes communicate.
    """
    for tensor in tensors if count() > 1 else ():
        sent = tensor.detach().to(device, copy=True)
        dist.broadcast(sent, 0)
        tensor.detach().copy_(sent)


def require_same(facts: str, device: torch.device) -> None:
    """Check that all processes train the same thing as process 0.

    Args:
        device: device on which processes communicate.

    Raises:
        ConfigError: in every process.
    """
    if count() == 1:
        return
    digest = int.from_bytes(hashlib.sha256(facts.encode()).digest()[:7], "little")
    mine = torch.tensor([digest, -digest], device=device)
    dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    if int(mine[0]) != -int(mine[1]):
        raise ConfigError(
            "Expected the same base, profiles and settings in all processes, found others. Load the same model and the "
            f"same data in the same order in each. Process {number()} of {count()} has: {facts}"
        )
