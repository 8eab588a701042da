"""Select which weights of a base are trained, as a function of the base alone.

Magnitudes are ordered by ``(|w|, position)``, position being (parameter, flat index). They are compared in one dtype
for the whole model: the coarsest that a targeted parameter has. Rounding to a coarser dtype never swaps two magnitudes,
it only makes some equal. So a base that is loaded in a coarser dtype gives the same mask, except among the magnitudes
that equal the threshold. For each of these, one bit records whether it was selected.

Parameters with separate thresholds are processed one module at a time. If the whole model shares one threshold, the
parameters are read several times, one after another, instead of being held together, since they may be dequantised.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ...core.files import dtype_from_name
from ...core.fingerprint import digest_of
from ...errors import MaskMismatchError, TargetError
from ..in_place.flat_indices import FlatIndices
from .random import distinct

_COARSER = {"float32": ("bfloat16", "float16"), "bfloat16": ("float16",), "float16": ("bfloat16",)}
"""In which dtypes the same base may be loaded later and show other magnitudes."""
_LAST_KEY = 0x7FFFFFFF
_NO_KEY = -1


@dataclass(frozen=True)
class Candidate:
    """A parameter that takes part in the selection.

    Attributes:
        owner: name of its module; the parameters of one module have one threshold with ``scope="module"``.
        numbers: the parameter; or a function that makes its values each time they are read and does not keep them.
        excluded: index of a slice that takes no part (an embedding's padding row); None: none.
        shape, dtype, device: those of the values.
    """

    owner: str
    numbers: Tensor | Callable[[], Tensor]
    excluded: int | None = None
    shape: torch.Size = field(init=False)
    dtype: torch.dtype = field(init=False)
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        numbers = self.read()
        for name in ("shape", "dtype", "device"):
            object.__setattr__(self, name, getattr(numbers, name))

    def read(self) -> Tensor:
        """The values."""
        return self.numbers.detach() if isinstance(self.numbers, Tensor) else self.numbers()


@dataclass(frozen=True)
class Rule:
    """How weights are selected; the fields are those of :class:`~peft_xmask.MagnitudeMaskConfig`."""

    density: float
    selection: str = "smallest"
    scope: str = "module"
    seed: int = 0


@dataclass(frozen=True)
class Mask:
    """The positions that are trained.

    Attributes:
        indices: for each candidate, in order.
        dtype: name of the dtype in which magnitudes were compared.
        ties: by dtype name, which of the magnitudes that equal the threshold in that dtype were chosen: packed bits in
            base64.
        fingerprint: of shapes and positions, 16 hexadecimal digits.
    """

    indices: tuple[FlatIndices, ...]
    dtype: str
    ties: Mapping[str, str]
    fingerprint: str


def make_mask(candidates: Sequence[Candidate], rule: Rule, dtype: str | None = None, *, tell_ties: bool = True) -> Mask:
    """Select a mask on a base.

    Args:
        dtype: dtype in which magnitudes are compared; None: the coarsest dtype of a candidate.
        tell_ties: whether to record the ties that other dtypes of the base need.

    Raises:
        TargetError: the density selects no weight.
    """
    dtype = dtype or coarsest_dtype(candidates)
    chosen: dict[int, Tensor] = {}
    told: dict[str, list[Tensor]] = {name: [] for name in _COARSER[dtype] if tell_ties and rule.selection != "random"}
    for number, members in enumerate(_groups(candidates, rule)):
        group = [candidates[i] for i in members]
        keys = _Keys(group, rule, dtype)
        count = _count(group[0].owner, keys, rule)
        if rule.selection == "random":
            found = _random(keys, count, rule.seed, number)
        else:
            threshold = _kth(keys, count)
            found = _first(keys, threshold, count)
            for name, bits in told.items():
                bits += [
                    _chosen_ties(each, rule, threshold, dtype, name, ix) for each, ix in zip(group, found, strict=True)
                ]
        chosen.update(zip(members, found, strict=True))
    ties = {name: _pack(bits) for name, bits in told.items()}
    return _mask(candidates, [chosen[i] for i in range(len(candidates))], dtype, ties)


def recover_mask(
    candidates: Sequence[Candidate], rule: Rule, *, dtype: str, ties: Mapping[str, str], fingerprint: str
) -> Mask:
    """Recompute a mask on the same base, which may now be loaded in another dtype.

    Args:
        dtype, ties, fingerprint: of the mask, see :class:`Mask`.

    Raises:
        MaskMismatchError: this base gives another mask.
        TargetError: see :func:`make_mask`.
    """
    here = coarsest_dtype(candidates)
    if here in (dtype, "float32") or rule.selection == "random":
        chosen = [each.index for each in make_mask(candidates, rule, dtype, tell_ties=False).indices]
    else:
        chosen = _chosen_with_ties(candidates, rule, here, ties.get(here, ""))
    mask = _mask(candidates, chosen, dtype, ties)
    if mask.fingerprint == fingerprint:
        return mask
    cast = "" if here == dtype else f" The mask was made on weights in {dtype}; this base is loaded in {here}."
    raise MaskMismatchError(
        f"These values belong to the mask with fingerprint {fingerprint}; the base at hand gives {mask.fingerprint}. "
        f"It is another base, or its weights were changed.{cast} Load the base that the adapter was trained on, in the "
        "dtype it was trained in.",
        expected=fingerprint,
        found=mask.fingerprint,
    )


def coarsest_dtype(candidates: Iterable[Candidate]) -> str:
    """Name of the dtype in which all candidates can be compared fairly."""
    present = {candidate.dtype for candidate in candidates}
    half = present & {torch.bfloat16, torch.float16}
    return str(half.pop()).removeprefix("torch.") if len(half) == 1 else "float32"


def _mask(candidates: Sequence[Candidate], chosen: Sequence[Tensor], dtype: str, ties: Mapping[str, str]) -> Mask:
    parts: list[bytes] = []
    for candidate, index in zip(candidates, chosen, strict=True):
        parts += [repr(tuple(candidate.shape)).encode(), index.cpu().numpy().astype("<i8").tobytes()]
    indices = tuple(FlatIndices(index, each.shape) for index, each in zip(chosen, candidates, strict=True))
    return Mask(indices, dtype, dict(ties), digest_of(parts))


def _groups(candidates: Sequence[Candidate], rule: Rule) -> list[list[int]]:
    """Groups of candidates that share a threshold."""
    groups: dict[str, list[int]] = {}
    for i, candidate in enumerate(candidates):
        groups.setdefault(candidate.owner if rule.scope == "module" else "", []).append(i)
    return list(groups.values())


def _keys(candidate: Candidate, rule: Rule, *dtypes: str) -> Tensor:
    """One int32 per weight: lower keys are selected first; negative keys are excluded."""
    if rule.selection == "random":
        keys = torch.zeros(candidate.shape, dtype=torch.int32, device=candidate.device)
    else:
        numbers = candidate.read()
        for dtype in dtypes:
            numbers = numbers.to(dtype_from_name(dtype))
        keys = numbers.abs().float().contiguous().view(torch.int32)  # non-negative floats are ordered as their bits
        if rule.selection == "largest":
            keys = _LAST_KEY - keys
    if candidate.excluded is not None:
        keys = keys.clone()
        keys[candidate.excluded] = _NO_KEY
    return keys.view(-1)


class _Keys:
    """Keys of candidates with one threshold: kept if they are of one module, else made anew each time they are read."""

    def __init__(self, group: Sequence[Candidate], rule: Rule, dtype: str) -> None:
        self._make = lambda: (_keys(each, rule, dtype) for each in group)
        self._kept = list(self._make()) if rule.scope == "module" else None

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._kept) if self._kept is not None else self._make()


def _count(owner: str, keys: Iterable[Tensor], rule: Rule) -> int:
    eligible = sum(int((key >= 0).sum()) for key in keys)
    count = round(rule.density * eligible)
    if count < 1:
        raise TargetError(
            f"density={rule.density} selects none of the {eligible:,} weights of '{owner}'. Raise the density, or "
            'exclude the module. With scope="model", a module may have none.'
        )
    return count


def _kth(keys: Iterable[Tensor], count: int) -> int:
    """The ``count``-th lowest key of all, by its upper and then its lower 16 bits. Linear time, no sorting."""
    high, before = _bin((key[key >= 0] >> 16 for key in keys), 1 << 15, count)
    low, _ = _bin((key[key >> 16 == high] & 0xFFFF for key in keys), 1 << 16, count - before)
    return high << 16 | low


def _bin(numbers: Iterable[Tensor], bins: int, count: int) -> tuple[int, int]:
    """The bin of the ``count``-th lowest value, and how many values the bins before it hold."""
    total = sum(torch.bincount(each, minlength=bins).cpu() for each in numbers)
    assert isinstance(total, Tensor)
    sums = total.cumsum(0)
    found = int(torch.searchsorted(sums, count))
    return found, int(sums[found] - total[found])


def _first(keys: Iterable[Tensor], threshold: int, count: int) -> list[Tensor]:
    """Positions of the first ``count`` in the order of (key, position)."""
    found, ties = [], []
    for key in keys:
        found.append(((key >= 0) & (key <= threshold)).nonzero().view(-1))
        ties.append((key[found[-1]] == threshold).nonzero().view(-1))
    surplus = sum(len(index) for index in found) - count
    for i in reversed(range(len(found))):
        dropped = ties[i][max(0, len(ties[i]) - surplus) :]
        surplus -= len(dropped)
        kept = torch.ones(len(found[i]), dtype=torch.bool, device=found[i].device)
        kept[dropped] = False
        found[i] = found[i][kept]
    return found


def _chosen_ties(candidate: Candidate, rule: Rule, threshold: int, dtype: str, coarse: str, index: Tensor) -> Tensor:
    """Which of the values that equal the threshold in a coarser dtype are chosen: bool, in their order."""
    bits = torch.tensor([_LAST_KEY - threshold if rule.selection == "largest" else threshold], dtype=torch.int32)
    limit = _keys(Candidate("", bits.view(torch.float32)), rule, dtype, coarse)
    ties = (_keys(candidate, rule, dtype, coarse) == int(limit)).nonzero().view(-1)
    return torch.isin(ties, index, assume_unique=True).cpu()


def _chosen_with_ties(candidates: Sequence[Candidate], rule: Rule, dtype: str, packed: str) -> list[Tensor]:
    told, at = _unpack(packed), 0
    chosen: dict[int, Tensor] = {}
    for members in _groups(candidates, rule):
        keys = _Keys([candidates[i] for i in members], rule, dtype)
        threshold = _kth(keys, _count(candidates[members[0]].owner, keys, rule))
        for i, key in zip(members, keys, strict=True):
            ties = (key == threshold).nonzero().view(-1)
            bits = torch.zeros(len(ties), dtype=torch.bool)
            here = told[at : at + len(ties)]
            bits[: len(here)] = here
            at += len(ties)
            below = ((key >= 0) & (key < threshold)).nonzero().view(-1)
            chosen[i] = torch.cat([below, ties[bits.to(ties.device)]]).sort().values
    return [chosen[i] for i in range(len(candidates))]


def _random(keys: Iterable[Tensor], count: int, seed: int, stream: int) -> list[Tensor]:
    total = sum(int((key >= 0).sum()) for key in keys)
    drawn = torch.from_numpy(distinct(count, total, seed=seed, stream=stream))
    found, start = [], 0
    for key in keys:
        eligible = (key >= 0).nonzero().view(-1)
        own = drawn[(drawn >= start) & (drawn < start + len(eligible))] - start
        found.append(eligible[own.to(eligible.device)])
        start += len(eligible)
    return found


def _pack(bits: Sequence[Tensor]) -> str:
    return base64.b64encode(np.packbits(torch.cat(list(bits)).numpy()).tobytes()).decode() if bits else ""


def _unpack(packed: str) -> Tensor:
    try:
        content = base64.b64decode(packed, validate=True)
    except (binascii.Error, ValueError):
        content = b""  # the fingerprint will not agree
    return torch.from_numpy(np.unpackbits(np.frombuffer(content, dtype=np.uint8)).astype(np.bool_))
