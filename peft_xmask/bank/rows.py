"""The rows of a bank: masks, gains and names where its files have them, and what was edited since."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import ConfigError, FileFormatError
from ..tuners.xpeft import XPEFTConfig
from ..tuners.xpeft.spec import MaskSpec
from .names import NameIndex, check_name
from .profile import Profile
from .storage import Content, in_blocks

_CHECKED = 4096  # rows that are checked at once


class BankRows:
    """Profiles by name, in order, with what they have in common.

    Adding and removing change nothing that is stored, at a cost that does not depend on how many profiles there are.

    Args:
        config: of the profiles: pool, sizes, fingerprints.
        bits: uint8 ``[P, 2, S, W]``, see :class:`~peft_xmask.tuners.xpeft.spec.MaskSpec`.
        gain_bits: uint8 ``[P, S, 2]``; None where gains are not learnt.
        names: of the rows, in order.
        shared: tensors of modules that all profiles share, such as a head, by their name in an adapter's file.

    Raises:
        ConfigError: a name that cannot be or comes twice, or another number of names than of rows.
        MaskFormatError: bytes of another shape or dtype. What is in them is checked when a profile is used.
    """

    def __init__(
        self,
        config: XPEFTConfig,
        bits: Tensor,
        gain_bits: Tensor | None,
        names: Sequence[str] | NameIndex,
        shared: Mapping[str, Tensor] | None = None,
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
        self.shared = dict(shared or {})
        self._bits, self._gain_bits = bits, gain_bits
        self._index = names if isinstance(names, NameIndex) else NameIndex.build(names)
        if len(self._index) != len(bits):
            raise ConfigError(f"Expected a name for each of {len(bits)} profiles, found {len(self._index)}.")
        self._added: dict[str, Profile] = {}
        self._removed: set[str] = set()

    def __len__(self) -> int:
        return len(self._index) - len(self._removed) + len(self._added)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._added or self._row(name) is not None)

    def __iter__(self) -> Iterator[str]:
        """Names: those of the file in its order, then those that were added."""
        yield from (name for name in self._index if name not in self._removed)
        yield from self._added

    def __getitem__(self, name: str) -> Profile:
        """A profile by name, checked.

        Raises:
            KeyError: no such profile.
            MaskFormatError: its bytes are no masks.
        """
        if name in self._added:
            return self._added[name]
        row = self._row(name)
        if row is None:
            raise self._unknown(name)
        gain_bits = None if self._gain_bits is None else self._gain_bits[row].clone()
        profile = Profile(self._bits[row].clone(), gain_bits)
        _check(profile, self.spec)
        return profile

    @property
    def nbytes(self) -> int:
        """Bytes of masks and gains of one profile."""
        gains = 0 if self._gain_bits is None else 2 * self.spec.num_sites
        return 2 * self.spec.num_sites * self.spec.bits_shape[-1] + gains

    def put(self, name: str, profile: Profile) -> None:
        """Enter a profile, or put another one in the place of that of this name.

        Raises:
            ConfigError: a name that cannot be.
            MaskFormatError: masks of another kind, or none.
        """
        check_name(name)
        _check(profile, self.spec)
        if self._row(name) is not None:
            self._removed.add(name)
        self._added[name] = profile

    def remove(self, name: str) -> None:
        """Forget a profile.

        Raises:
            KeyError: no such profile.
        """
        if name in self._added:
            del self._added[name]
        elif self._row(name) is not None:
            self._removed.add(name)
        else:
            raise self._unknown(name)

    def pick(self, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Masks and gains of some profiles, in this order and checked.

        Raises:
            KeyError: no such profile.
            MaskFormatError: bytes that are no masks.
        """
        rows = [-1 if name in self._added else self._row(name) for name in names]
        if None in rows:
            raise self._unknown(names[rows.index(None)])
        places = torch.tensor(rows, dtype=torch.long)
        bits = self._picked(names, places, gains=False)
        gain_bits = None if self._gain_bits is None else self._picked(names, places, gains=True)
        for start in range(0, len(bits), _CHECKED):
            some = slice(start, start + _CHECKED)
            self.spec.check(bits[some], None if gain_bits is None else gain_bits[some])
        return bits, gain_bits

    def content(self) -> Content:
        """The profiles as they are now: where the file has them or, if the bank was edited since, copied together."""
        if not (self._added or self._removed):
            return Content(self._bits, self._gain_bits, self.shared, self._index)
        bits = torch.cat([self._bits[:0], *self.blocks()])
        gain_bits = None if self._gain_bits is None else torch.cat([self._gain_bits[:0], *self.blocks(gains=True)])
        return Content(bits, gain_bits, self.shared, self.name_index())

    def blocks(self, gains: bool = False) -> Iterator[Tensor]:
        """Masks ``[rows, 2, S, W]``, or gains ``[rows, S, 2]``, in the order of the bank, some megabytes at a time."""
        stored = self._gain_bits if gains else self._bits
        assert stored is not None
        yield from in_blocks(stored, self._kept())
        for profile in self._added.values():
            row = profile.gain_bits if gains else profile.bits
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
        """The names as they are now."""
        return NameIndex.build(self) if self._added or self._removed else self._index

    def _row(self, name: str) -> int | None:
        return None if name in self._removed else self._index.find(name)

    def _unknown(self, name: str) -> KeyError:
        return KeyError(f"No profile {name!r} in this bank of {len(self)}.")

    def _picked(self, names: Sequence[str], rows: Tensor, gains: bool) -> Tensor:
        """Masks or gains of some profiles: rows of the file, and -1 for one that was added."""
        stored = self._gain_bits if gains else self._bits
        assert stored is not None
        found = torch.empty(len(rows), *stored.shape[1:], dtype=stored.dtype)
        found[rows >= 0] = stored[rows[rows >= 0]]
        for place in (rows < 0).nonzero().flatten().tolist():
            profile = self._added[names[place]]
            row = profile.gain_bits if gains else profile.bits
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


def _check(profile: Profile, spec: MaskSpec) -> None:
    gain_bits = None if profile.gain_bits is None else profile.gain_bits.unsqueeze(0)
    if (gain_bits is None) == spec.learn_gain:
        raise FileFormatError(f"Expected a profile with learn_gain={spec.learn_gain}, found another.")
    spec.check(profile.bits.unsqueeze(0), gain_bits)
