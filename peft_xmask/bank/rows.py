"""The rows of a bank: masks, gains, offsets and names, mapped from its file, and later edits in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.packing import unpack_halves
from ..errors import ConfigError, FileFormatError, MaskFormatError
from ..tuners.xpeft import XPEFTConfig
from .names import NameIndex, as_name, as_names, check_name
from .profile import Profile
from .storage import BITS, ROWS, Content, in_blocks

if TYPE_CHECKING:
    from typing_extensions import Self

_CHECKED = 4096  # rows that are checked at once


class BankRows:
    """Profiles by name, in order, and the config and head that they share.

    Edits stay in memory, at a cost that does not depend on the number of profiles.

    Args:
        config: of the profiles: pool, sizes, fingerprints.
        bits: uint8 ``[P, 2, S, W]``, see :class:`~peft_xmask.tuners.xpeft.spec.MaskSpec`.
        gain_bits: uint8 ``[P, S, 2]``; None where gains are not learnt.
        names: of the rows, in order: strings, or whole numbers, which stand for their decimal digits.
        shared: tensors of modules that all profiles share, such as a head, by their name in an adapter's file.
        offset_bits: uint8 ``[P, 2 * C]``, half-precision numbers added to C outputs; None where there are none.

    Raises:
        ConfigError: an invalid name, a name that comes twice, or another number of names than of rows.
        MaskFormatError: bytes of another shape or dtype. Their content is checked when a profile is used.
    """

    def __init__(
        self,
        config: XPEFTConfig,
        bits: Tensor,
        gain_bits: Tensor | None,
        names: Sequence[str | int] | NameIndex,
        shared: Mapping[str, Tensor] | None = None,
        offset_bits: Tensor | None = None,
    ) -> None:
        if bits.dim() != 4:
            raise FileFormatError(f"Expected masks of shape [P, 2, S, W], found {tuple(bits.shape)}.")
        self.config = config
        self.spec = config.mask_spec(bits.shape[2])
        self.spec.check_shapes(bits, gain_bits)
        if (gain_bits is None) == config.learn_gain or (gain_bits is not None and len(gain_bits) != len(bits)):
            raise FileFormatError(
                f"Expected gains for {len(bits) if config.learn_gain else 0} profiles, as learn_gain="
                f"{config.learn_gain} says, found {'none' if gain_bits is None else len(gain_bits)}."
            )
        if offset_bits is not None:
            check_offset_shape(offset_bits, len(bits))
        self.shared = dict(shared or {})
        self._stored = Content(bits, gain_bits, self.shared, None, offset_bits)
        self._index = names if isinstance(names, NameIndex) else NameIndex.build(as_names(names))
        if len(self._index) != len(bits):
            raise ConfigError(f"Expected a name for each of {len(bits)} profiles, found {len(self._index)}.")
        self._added: dict[str, Profile] = {}
        self._removed: set[str] = set()
        self.place: str | None = None
        """Where the bank was opened, for errors."""

    def __len__(self) -> int:
        return len(self._index) - len(self._removed) + len(self._added)

    def __contains__(self, name: object) -> bool:
        found = as_name(name)
        return isinstance(found, str) and (found in self._added or self._row(found) is not None)

    def __iter__(self) -> Iterator[str]:
        """Names of the file in its order, then names that were added."""
        yield from (name for name in self._index if name not in self._removed)
        yield from self._added

    def __getitem__(self, name: str | int) -> Profile:
        """A profile by name, checked.

        Raises:
            KeyError: there is no such profile.
            MaskFormatError: its bytes are not a valid profile.
        """
        name = as_name(name)
        if name in self._added:
            return self._added[name]
        row = self._row(name)
        if row is None:
            raise self._unknown(name)
        bits, gain_bits, offset_bits = (
            None if tensor is None else tensor[row].clone() for tensor in self._stored.tensors
        )
        assert bits is not None
        profile = Profile(bits, gain_bits, offset_bits)
        self.check(profile)
        return profile

    @property
    def nbytes(self) -> int:
        """Bytes of masks, gains and offsets of one profile."""
        return sum(prod(tensor.shape[1:]) for tensor in self._stored.rows.values())

    @property
    def offset_count(self) -> int | None:
        """How many outputs the profiles have offsets for; None: they have no offsets."""
        return None if self._stored.offset_bits is None else self._stored.offset_bits.shape[1] // 2

    def put(self, name: str | int, profile: Profile) -> None:
        """Add a profile, or replace the one with this name.

        Raises:
            ConfigError: the name is invalid.
            FileFormatError, MaskFormatError: the bytes are not a valid profile of this bank.
        """
        name = as_name(name)
        check_name(name)
        self.check(profile)
        if self._row(name) is not None:
            self._removed.add(name)
        self._added[name] = profile

    def remove(self, name: str | int) -> None:
        """Remove a profile.

        Raises:
            KeyError: there is no such profile.
        """
        name = as_name(name)
        if name in self._added:
            del self._added[name]
        elif self._row(name) is not None:
            self._removed.add(name)
        else:
            raise self._unknown(name)

    def rename(self, old: str | int, new: str | int) -> None:
        """Give a profile another name. It moves to the end of the bank's order.

        Raises:
            KeyError: there is no such profile.
            ConfigError: the new name is invalid or taken.
        """
        profile = self[old]
        if as_name(new) == as_name(old):
            return
        if new in self:
            raise ConfigError(
                f"A profile called {as_name(new)!r} exists already. Remove it first, or choose another name."
            )
        self.put(new, profile)
        self.remove(old)

    def without(self, names: Iterable[str]) -> Self:
        """The same bank without some of the profiles; those that it does not have are ignored. Nothing is copied."""
        found = copy.copy(self)
        gone = [name for name in names if name in self]
        found._added = {name: profile for name, profile in self._added.items() if name not in set(gone)}
        found._removed = self._removed | {name for name in gone if self._row(name) is not None}
        return found

    def pick(self, names: Sequence[str]) -> Content:
        """The rows of some profiles, in this order and checked.

        Raises:
            KeyError: there is no such profile.
            MaskFormatError: the bytes are not a valid profile.
        """
        rows = [-1 if name in self._added else self._row(name) for name in names]
        if None in rows:
            raise self._unknown(names[rows.index(None)])
        places = torch.tensor(rows, dtype=torch.long)
        bits, gain_bits, offset_bits = (
            None if tensor is None else self._picked(tensor, part, names, places)
            for part, tensor in enumerate(self._stored.tensors)
        )
        assert bits is not None
        for start in range(0, len(bits), _CHECKED):
            some = slice(start, start + _CHECKED)
            self.spec.check(bits[some], None if gain_bits is None else gain_bits[some])
            check_offsets(None if offset_bits is None else offset_bits[some])
        return Content(bits, gain_bits, self.shared, None, offset_bits)

    def content(self) -> Content:
        """All profiles. Without edits these are the mapped rows of the file; with edits, a copy."""
        bits, gain_bits, offset_bits = self._stored.tensors
        if self._added or self._removed:
            bits, gain_bits, offset_bits = (
                None if tensor is None else torch.cat([tensor[:0], *self.blocks(key)])
                for key, tensor in zip(ROWS, self._stored.tensors, strict=True)
            )
        assert bits is not None
        return Content(bits, gain_bits, self.shared, self.name_index(), offset_bits)

    def blocks(self, key: str = BITS) -> Iterator[Tensor]:
        """Rows of one tensor, in the order of the bank, a few megabytes at a time.

        Args:
            key: which one, by its name in a file: masks ``[rows, 2, S, W]``, gains ``[rows, S, 2]`` or offsets.
        """
        yield from in_blocks(self._stored.rows[key], self._kept())
        part = ROWS.index(key)
        for profile in self._added.values():
            row = profile.parts[part]
            assert row is not None
            yield row.unsqueeze(0)

    def name_at(self, place: int) -> str:
        """Name of a profile by its place in the order of the bank."""
        stored = len(self._index) - len(self._removed)
        if place >= stored:
            return list(self._added)[place - stored]
        kept = self._kept()
        return self._index.name(place if kept is None else int(kept[place]))

    def name_index(self) -> NameIndex:
        """The names, edits included."""
        return NameIndex.build(self) if self._added or self._removed else self._index

    def row_keys(self) -> list[str]:
        """Which tensors of rows the bank has, by their names in a file."""
        return list(self._stored.rows)

    def row_shape(self, key: str) -> tuple[int, ...]:
        """Shape of one row of such a tensor."""
        return tuple(self._stored.rows[key].shape[1:])

    def _row(self, name: str) -> int | None:
        return None if name in self._removed else self._index.find(name)

    def _unknown(self, name: str) -> KeyError:
        return KeyError(f"No profile {name!r} in this bank of {len(self)}{f' ({self.place})' if self.place else ''}.")

    def check(self, profile: Profile) -> None:
        """Refuse a profile that is not of this bank's kind.

        Raises:
            FileFormatError: it has gains or offsets and the bank has none, or the other way round.
            MaskFormatError: another shape, or bytes that are not those of a profile.
        """
        gain_bits, offset_bits = profile.gain_bits, profile.offset_bits
        if (gain_bits is None) == self.spec.learn_gain:
            raise FileFormatError(f"Expected a profile with learn_gain={self.spec.learn_gain}, found another.")
        found = None if offset_bits is None else offset_bits.numel() // 2
        if found != self.offset_count:
            raise FileFormatError(f"Expected a profile with offsets for {self.offset_count} outputs, found {found}.")
        self.spec.check(profile.bits.unsqueeze(0), None if gain_bits is None else gain_bits.unsqueeze(0))
        if offset_bits is not None:
            check_offset_shape(offset_bits.unsqueeze(0), 1)
        check_offsets(offset_bits)

    def _picked(self, stored: Tensor, part: int, names: Sequence[str], rows: Tensor) -> Tensor:
        """Rows of a stored tensor, and -1 for a profile that was added."""
        found = torch.empty(len(rows), *stored.shape[1:], dtype=stored.dtype)
        found[rows >= 0] = stored[rows[rows >= 0]]
        for place in (rows < 0).nonzero().flatten().tolist():
            row = self._added[names[place]].parts[part]
            assert row is not None
            found[place] = row
        return found

    def _kept(self) -> Tensor | None:
        """Rows of the file that were not removed; None: all of them."""
        if not self._removed:
            return None
        gone = torch.tensor(sorted(row for name in self._removed if (row := self._index.find(name)) is not None))
        keep = torch.ones(len(self._index), dtype=torch.bool)
        keep[gone] = False
        return keep.nonzero().view(-1)


def check_offset_shape(offset_bits: Tensor, profiles: int) -> None:
    """Check that offsets are uint8 of shape ``[P, 2 * C]``.

    Raises:
        MaskFormatError: they are not.
    """
    shape = tuple(offset_bits.shape)
    if offset_bits.dtype != torch.uint8 or len(shape) != 2 or shape[0] != profiles or shape[1] % 2 or not shape[1]:
        raise MaskFormatError(
            f"Expected offset_bits as uint8 of shape [{profiles}, 2 * C], found {offset_bits.dtype} of shape {shape}. "
            "The file is damaged."
        )


def check_offsets(offset_bits: Tensor | None) -> None:
    """Check that offsets are finite.

    Raises:
        MaskFormatError: they are not.
    """
    if offset_bits is not None and not unpack_halves(offset_bits).isfinite().all():
        raise MaskFormatError("Expected finite offsets, found NaN or infinity. The file is damaged.")
