"""Very many profiles of one pool and base, in one folder."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from ..core.hub import HubOptions, find_folder, upload
from ..errors import ConfigError
from ..tuners.xpeft import XPEFTConfig
from ..tuners.xpeft.table import find_table
from .bake import BakedLora, LoraBaker
from .compatibility import check_alike
from .merging import without_twins, write_merged
from .names import as_names
from .profile import Profile
from .rows import BankRows
from .serving import put_in_place, serve, served_content
from .similar import Neighbour, similar
from .storage import FILENAMES, ROWS, Content, open_bank


class ProfileBank(BankRows):
    """Profiles by name, mapped from disk: opening a bank of a million reads one header.

    Its folder is an X-PEFT adapter with P rows, which plain ``PeftModel.from_pretrained`` loads too. Adding and
    removing change the bank in memory, at a cost that does not depend on how many profiles there are;
    :meth:`save_pretrained` writes them.

    Arguments and errors are those of :class:`~peft_xmask.bank.rows.BankRows`.
    """

    @classmethod
    def from_pretrained(
        cls,
        where: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> ProfileBank:
        """Open a bank: a folder, or a repository of the Hub.

        An ordinary X-PEFT adapter opens too; its rows are then called ``"0"``, ``"1"`` and so on.

        Raises:
            ConfigError: no such folder or repository.
            FileFormatError: files that are missing or damaged, or do not belong together.
        """
        stored = open_bank(find_folder(where, FILENAMES, HubOptions(revision, token, cache_dir), subfolder))
        bank = cls._of(stored.config, stored.content)
        bank.place = f"'{os.fspath(where)}'"
        return bank

    @classmethod
    def _of(cls, config: XPEFTConfig, content: Content) -> ProfileBank:
        names = range(len(content.bits)) if content.names is None else content.names
        return cls(config, content.bits, content.gain_bits, names, content.shared, content.offset_bits)

    @classmethod
    def from_model(cls, model: Any, names: Sequence[str | int] | None = None) -> ProfileBank:
        """A bank of what a model's active X-PEFT adapter holds now.

        Args:
            names: of its rows, in order: strings or whole numbers; None: ``"0"``, ``"1"`` and so on.

        Raises:
            ConfigError: no such adapter, invalid names, or another number of them than of rows.
        """
        table = find_table(model)
        name = next((name for name in model.active_adapters if name in table.adapters), None)
        if name is None:
            raise ConfigError("Expected a PEFT model whose active adapter is one of X-PEFT, found none.")
        state = get_peft_model_state_dict(model, adapter_name=name)
        shared = {key: tensor.cpu().clone() for key, tensor in state.items() if key not in ROWS}
        bits, gain_bits, offset_bits = (state[key].cpu() if key in state else None for key in ROWS)
        assert bits is not None
        return cls(
            copy.copy(model.peft_config[name]),
            bits,
            gain_bits,
            range(len(bits)) if names is None else names,
            shared,
            offset_bits,
        )

    @classmethod
    def from_profiles(cls, profiles: Mapping[Any, str | os.PathLike[str] | nn.Module]) -> ProfileBank:
        """A bank of adapters of one profile each: folders, or models that hold one.

        Raises:
            ConfigError, BaseMismatchError, PoolMismatchError: there is none, or they do not belong together.
        """
        if not profiles:
            raise ConfigError("Expected at least one profile to make a bank of, found none.")
        first = _single(next(iter(profiles.values())))
        bank = first.select([])
        for name, source in profiles.items():
            bank.add(name, source)
        return bank

    def __repr__(self) -> str:
        spec = self.spec
        return (
            f"ProfileBank({len(self):,} profiles, {spec.num_sites} sites, {spec.mask_type} masks over "
            f"{spec.num_adapters} adapters, pool {self.config.pool_fingerprint})"
        )

    def add(self, name: str | int, profile: Profile | str | os.PathLike[str] | nn.Module) -> None:
        """Enter a profile, or put another one in the place of that of this name.

        Args:
            profile: masks; or the folder of an adapter with one profile, or a model that has one (its active adapter),
                whose pool, base and settings must be those of the bank. A head that comes with it must be the bank's.

        Raises:
            ConfigError: a name that cannot be, several profiles, other settings, or another head.
            BaseMismatchError, PoolMismatchError, MaskFormatError: it does not belong here.
        """
        if not isinstance(profile, Profile):
            other = _single(profile)
            check_alike(self, other)
            profile = other[next(iter(other))]
        self.put(name, profile)

    def select(self, names: Iterable[str | int]) -> ProfileBank:
        """A bank of some of the profiles, in this order.

        Raises:
            KeyError: no such profile.
            ConfigError: a name comes twice.
        """
        wanted = as_names(names)
        content = self.pick(wanted)
        config = copy.copy(self.config)
        config.num_profiles = len(wanted)
        return ProfileBank(config, content.bits, content.gain_bits, wanted, content.shared, content.offset_bits)

    def similar(self, name: str, count: int = 10) -> list[Neighbour]:
        """The profiles whose masks differ from those of one in the fewest bits: nearest first, equals in bank order.

        Every profile is compared, in blocks; gains are not.

        Args:
            name: of the profile whose neighbours are wanted; it is not one of them.
            count: of neighbours.

        Raises:
            KeyError: no such profile.
            ConfigError: soft masks, or a count below 1.
        """
        return similar(self, name, count)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the bank, also over itself: whoever holds the old one goes on with it, and a crash leaves it whole.

        Raises:
            LockedError: another process is writing there.
        """
        write_merged([self], Path(folder))

    @classmethod
    def merge(
        cls,
        banks: Sequence[ProfileBank | str | os.PathLike[str]],
        folder: str | os.PathLike[str],
        *,
        prefer: str | None = None,
    ) -> ProfileBank:
        """Write several banks as one and open it. Masks stream from file to file; names are held in memory.

        Args:
            banks: opened, or where they are.
            folder: to write to; it may be that of one of the banks.
            prefer: whose profile is kept where several banks have one of a name, ``"first"`` or ``"last"``; None:
                a name in two banks is refused.

        Raises:
            ConfigError: no banks, a name in two of them, other settings, or other heads.
            BaseMismatchError, PoolMismatchError: they do not belong together.
            LockedError: another process is writing there.
        """
        opened = [bank if isinstance(bank, ProfileBank) else cls.from_pretrained(bank) for bank in banks]
        if not opened:
            raise ConfigError("Expected at least one bank to merge, found none.")
        for other in opened[1:]:
            check_alike(opened[0], other)
        write_merged(without_twins(opened, prefer), Path(folder))
        return cls.from_pretrained(folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Upload the bank in one commit; the commit's address.

        Raises:
            ConfigError: there is no token, or it may not write to the repository.
        """
        address, _ = upload(
            self.save_pretrained,
            repo_id,
            what="bank",
            filenames=FILENAMES,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message or f"Upload a bank of {len(self)} profiles",
        )
        return address

    @overload
    def to_lora(  # type: ignore[overload-overlap]  # a string is one name, not several of one letter
        self,
        names: str,
        base: str | os.PathLike[str] | None = None,
        *,
        rank: int | None = None,
        check_base: bool = True,
    ) -> BakedLora: ...

    @overload
    def to_lora(
        self,
        names: Iterable[str],
        base: str | os.PathLike[str] | None = None,
        *,
        rank: int | None = None,
        check_base: bool = True,
    ) -> Iterator[tuple[str, BakedLora]]: ...

    def to_lora(
        self,
        names: str | Iterable[str],
        base: str | os.PathLike[str] | None = None,
        *,
        rank: int | None = None,
        check_base: bool = True,
    ) -> BakedLora | Iterator[tuple[str, BakedLora]]:
        """Profiles as stock LoRAs, without a model: from the pool, the base's config and, if need be, its weights.

        The tensors are those of :func:`~peft_xmask.export_lora`, bit for bit. Opening the pool and the base takes most
        of the time: name many profiles at once, or keep a :class:`~peft_xmask.bank.bake.LoraBaker`.

        Args:
            names: of one profile, or of several.
            base: folder or Hub id of the base model; None: the one that the bank names.
            rank: of the LoRA; None: the pool's bottleneck size. Zeros fill up a larger one.
            check_base: whether the base's weights are read to check its fingerprint. Sequential profiles need the
                weights of the adapted modules in any case.

        Returns:
            The LoRA; of several names an iterator over pairs of a name and a LoRA, each made when it is asked for.

        Raises:
            KeyError: no such profile.
            MergeError: profiles that are not linear (``activation="identity"`` without ``layer_norm`` is).
            BaseMismatchError, PoolMismatchError: another base or pool than the profiles were trained on.
            ConfigError, TargetError, FileFormatError: a base that cannot be found or is not one, or ``rank`` below b.
        """
        baker = LoraBaker(self, base, check_base=check_base)
        if isinstance(names, str):
            return baker.bake(self[names], rank)
        return ((name, baker.bake(self[name], rank)) for name in names)

    def attach(self, model: nn.Module, adapter_name: str = "bank") -> PeftModel:
        """Serve the bank: an X-PEFT adapter of P rows, whose masks stay where the bank has them.

        Then ``model.set_profile("alice")`` chooses for whole batches, ``adapter_names=["alice", "bob", "__base__"]``
        for each example. Names are those of this moment: profiles added to the bank later are not known to the model.

        Args:
            model: the base, or a PeftModel on it that does not have an adapter of this name.

        Raises:
            ConfigError: an adapter of this name exists, or the bank is empty.
            BaseMismatchError, PoolMismatchError: the bank is of another base or pool.
        """
        self._refuse_empty()
        return serve(model, adapter_name, self.config, self.content())

    def replace(self, model: PeftModel, adapter_name: str = "bank") -> None:
        """Serve this bank in the place of the one that an adapter of the model serves, at the same cost for any P.

        To be called between forward passes. A profile that was chosen with ``set_profile`` has to be chosen again.

        Raises:
            ConfigError: the adapter serves no bank, or this one is empty or has other settings or another head.
            BaseMismatchError, PoolMismatchError: it is of another base or pool.
        """
        self._refuse_empty()
        old = served_content(model, adapter_name)
        config: Any = model.peft_config[adapter_name]
        check_alike(self._of(config, old), self)
        put_in_place(model, adapter_name, self.content())

    def _refuse_empty(self) -> None:
        if not len(self):
            raise ConfigError("Expected a bank with profiles, found an empty one.")


def _single(source: str | os.PathLike[str] | nn.Module) -> ProfileBank:
    """A bank of the one profile of an adapter."""
    bank = ProfileBank.from_model(source) if isinstance(source, nn.Module) else ProfileBank.from_pretrained(source)
    if len(bank) != 1:
        raise ConfigError(
            f"Expected an adapter with one profile, found {len(bank)}. Merge banks with ProfileBank.merge."
        )
    return bank
