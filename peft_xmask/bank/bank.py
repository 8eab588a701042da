"""A bank: many profiles of one pool and base, in one folder."""

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
from ..pool.beside import save_beside
from ..tuners.xpeft import XPEFTConfig
from ..tuners.xpeft.table import find_table
from .bake import BakedLora, LoraBaker
from .compatibility import check_alike
from .merging import without_twins, write_merged
from .names import as_name, as_names
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

    :class:`~peft_xmask.bank.rows.BankRows` documents the arguments and their errors.
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
            ConfigError: there is no such folder or repository.
            FileFormatError: a file is missing or damaged.
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
        """A bank of the profiles that a model's active X-PEFT adapter holds now.

        Args:
            names: of its rows, in order: strings or whole numbers; None: ``"0"``, ``"1"`` and so on.

        Raises:
            ConfigError: there is no such adapter, names are invalid, or their number differs from the number of rows.
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
        """A bank made of adapters with one profile each, given as folders or as models.

        Raises:
            ConfigError: there are no profiles, or they differ from the first in settings or head.
            BaseMismatchError, PoolMismatchError: a profile has another base or pool than the first.
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
        """Add a profile, or replace the one with this name.

        Args:
            profile: its masks; or an adapter with one profile, as a folder or as the active adapter of a model. The
                adapter must have the pool, base, settings and head of the bank.

        Raises:
            ConfigError: the name is invalid, there are several profiles, or settings or head differ.
            BaseMismatchError, PoolMismatchError, MaskFormatError: the profile does not fit the bank.
        """
        if not isinstance(profile, Profile):
            other = _single(profile)
            check_alike(self, other)
            profile = other[next(iter(other))]
        self.put(name, profile)

    def learn(
        self, model: nn.Module, name: str | int, examples: Sequence[Mapping[str, Any]], settings: Any = None, **how: Any
    ) -> Profile:
        """Learn a profile from a few examples and enter it, in place of one of the same name.

        The method of :func:`peft_xmask.learn_profile`: the model is not modified, and serves the profile after
        :meth:`replace`.

        Args:
            model: the base, or a model that serves this bank.
            name: of the profile.
            examples: tokenised, with labels.
            settings: a :class:`peft_xmask.ProfileLearning`; None: the defaults.
            how: ``processing_class`` or ``data_collator``, which make a batch of the examples.

        Raises:
            ConfigError: an invalid name, no examples, or labels whose loss is not known.
            BaseMismatchError, PoolMismatchError: the bank belongs to another base or pool.
        """
        from ..training.learn import learn_profile  # points up on purpose: learning needs a training loop

        return learn_profile(model, self, as_name(name), examples, settings, **how)

    def select(self, names: Iterable[str | int]) -> ProfileBank:
        """A bank of some of the profiles, in this order.

        Raises:
            KeyError: there is no such profile.
            ConfigError: a name occurs twice.
        """
        wanted = as_names(names)
        content = self.pick(wanted)
        config = copy.copy(self.config)
        config.num_profiles = len(wanted)
        return ProfileBank(config, content.bits, content.gain_bits, wanted, content.shared, content.offset_bits)

    def similar(self, name: str, count: int = 10) -> list[Neighbour]:
        """The profiles nearest to one profile, by the number of bits in which their masks differ.

        Compares every profile, in blocks. Gains do not count. Profiles at the same distance come in the bank's order.

        Args:
            name: the profile whose neighbours to find; it is not among them.
            count: how many neighbours to return.

        Raises:
            KeyError: there is no such profile.
            ConfigError: soft masks, or a count below 1.
        """
        return similar(self, name, count)

    def save_pretrained(self, folder: str | os.PathLike[str], *, with_pool: bool = False) -> None:
        """Write the bank, also over itself. Readers of the old bank keep it, and a crash leaves the old or the new one.

        Args:
            folder: to write to.
            with_pool: also save the pool there, unless a seed says what it is, so that the folder needs nothing but the
                base. A pool that the bank already has beside it is always copied.

        Raises:
            LockedError: another process is writing the folder.
        """
        bank = self
        if with_pool:
            pool = copy.copy(self.config).resolve_pool()
            if pool.kind != "random" or pool.common is not None:
                config = copy.copy(self.config)
                config.pool = str(save_beside(pool, Path(folder)).name_or_path)
                bank = self._of(config, self.content())
        write_merged([bank], Path(folder))

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
            banks: banks, or folders and Hub ids of banks.
            folder: to write to; it may be that of one of the banks.
            prefer: whose profile is kept where several banks have one of a name, ``"first"`` or ``"last"``; None:
                a name in two banks is refused.

        Raises:
            ConfigError: no banks, a name in two of them, or banks that differ in their settings or heads.
            BaseMismatchError, PoolMismatchError: banks of different bases or pools.
            LockedError: another process is writing the folder.
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
        """Upload the bank in one commit; return the commit's address.

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
        """Profiles as standard LoRAs, computed without a model: from the pool and the base's config and weights.

        The tensors are those of :func:`~peft_xmask.export_lora`, bit for bit. Opening the pool and the base takes most
        of the time: name many profiles at once, or keep a :class:`~peft_xmask.bank.bake.LoraBaker`.

        Args:
            names: of one profile, or of several.
            base: folder or Hub id of the base model; None: the one that the bank names.
            rank: rank of the LoRA; None: the pool's bottleneck size. A larger rank is padded with zeros.
            check_base: whether the base's weights are read to check its fingerprint. Sequential profiles need the
                weights of the adapted modules in any case.

        Returns:
            The LoRA; for several names, an iterator of pairs of a name and a LoRA, computed lazily.

        Raises:
            KeyError: there is no such profile.
            MergeError: profiles that are not linear (``activation="identity"`` without ``layer_norm`` is).
            BaseMismatchError, PoolMismatchError: the profiles were trained on another base or pool.
            ConfigError, TargetError, FileFormatError: the base is missing or invalid, or ``rank`` is below b.
        """
        baker = LoraBaker(self, base, check_base=check_base)
        if isinstance(names, str):
            return baker.bake(self[names], rank)
        return ((name, baker.bake(self[name], rank)) for name in names)

    def attach(self, model: nn.Module, adapter_name: str = "bank") -> PeftModel:
        """Serve the bank: an X-PEFT adapter of P rows, whose masks stay where the bank has them.

        Then ``model.set_profile("alice")`` chooses for whole batches, ``adapter_names=["alice", "bob", "__base__"]``
        for each example. Profiles added to the bank later are not visible to the model; see :meth:`replace`.

        Args:
            model: the base, or a PeftModel on it without an adapter of this name.

        Raises:
            ConfigError: an adapter of this name exists, the bank is empty, or the base lacks the head that the
                profiles share.
            BaseMismatchError, PoolMismatchError: the bank belongs to another base or pool.
        """
        self._refuse_empty()
        return serve(model, adapter_name, self.config, self.content())

    def replace(self, model: PeftModel, adapter_name: str = "bank") -> None:
        """Serve this bank instead of the one that an adapter of the model serves. The cost does not depend on P.

        Call it between forward passes, then choose the profile again if it was chosen with ``set_profile``.

        Raises:
            ConfigError: the adapter serves no bank, or this bank is empty or has other settings or another head.
            BaseMismatchError, PoolMismatchError: this bank belongs to another base or pool.
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
    """A bank with the single profile of an adapter."""
    bank = ProfileBank.from_model(source) if isinstance(source, nn.Module) else ProfileBank.from_pretrained(source)
    if len(bank) != 1:
        raise ConfigError(
            f"Expected an adapter with one profile, found {len(bank)}. Merge banks with ProfileBank.merge."
        )
    return bank
