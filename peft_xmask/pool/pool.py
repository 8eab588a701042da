"""The pool, as users handle it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.files import dtype_name, require_storage_dtype
from ..core.hub import CONFIG_FILE, Folder, HubOptions, find_folder
from ..core.sites import Site
from ..errors import ConfigError
from . import bottleneck, lora, storage
from .common import CommonPart, beside
from .common import centre as centre_adapters
from .directions import Fitting
from .random import BOTTLENECK_SIZE, NUM_ADAPTERS, RandomAdapters
from .slice import PoolSlice
from .trained import TrainedAdapter, TrainedAdapters, stack

PathLike = str | os.PathLike[str]


class AdapterPool:
    """N frozen adapters per site, shared by every profile.

    Create one with :meth:`random`, :meth:`fit`, :meth:`from_adapters` or :meth:`from_pretrained`. A pool never
    changes: copying returns the pool itself, and two pools are equal if their fingerprints are. Only ``name_or_path``
    is set anew, by :meth:`save_pretrained` and :meth:`push_to_hub`.
    """

    def __init__(
        self,
        adapters: RandomAdapters | TrainedAdapters,
        name_or_path: str | None = None,
        common: CommonPart | None = None,
        fitting: Fitting | None = None,
    ) -> None:
        self._adapters = adapters
        self._name_or_path = name_or_path
        self._common = common
        self._fitting = fitting

    @classmethod
    def random(
        cls,
        num_adapters: int = NUM_ADAPTERS,
        bottleneck_size: int = BOTTLENECK_SIZE,
        seed: int = 0,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> AdapterPool:
        """A pool of untrained adapters. It *is* its seed: tensors are generated when a model uses it.

        The same (seed, site, adapter) gives the same bits for any N, machine, number of threads and order. Scales are
        those of :class:`~peft_xmask.pool.random.RandomAdapters`.

        Args:
            num_adapters: N.
            bottleneck_size: b.
            seed: 0 <= seed < 2**64.
            dtype: float32, or bfloat16 or float16, to which the float32 values are rounded.

        Raises:
            ConfigError: a value is out of range.
        """
        return cls(RandomAdapters(num_adapters, bottleneck_size, seed, dtype))

    @classmethod
    def from_lora(
        cls,
        adapters: Sequence[PathLike],
        *,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: PathLike | None = None,
    ) -> AdapterPool:
        """A pool of LoRA adapters that PEFT saved: ``down = lora_A``, ``up = scale * lora_B``, parallel, linear.

        Args:
            adapters: folders or Hub ids; equal targets and rank. ``lora_alpha`` may differ.
            dtype: dtype to store them in; None: the adapters' own if they agree, else float32.
            revision: revision of the Hub ids.
            token: token for the Hub.
            cache_dir: cache folder for files from the Hub.

        Raises:
            ConfigError: an adapter cannot be found or is not a plain LoRA, or the adapters differ (the message lists
                each difference).
            FileFormatError: a file is missing or damaged, or is a pickle instead of safetensors.
        """
        folders = _folders(adapters, lora.FILENAMES, HubOptions(revision, token, cache_dir))
        return cls(stack("lora", [lora.read_lora(folder) for folder in folders], _checked(dtype)))

    @classmethod
    def from_bottleneck(
        cls,
        adapters: Sequence[PathLike],
        *,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: PathLike | None = None,
    ) -> AdapterPool:
        """A pool of bottleneck adapters: ours (peft_type BOTTLENECK_ADAPTER), or AdapterHub's `seq_bn` in safetensors.

        Args:
            adapters: folders or Hub ids; equal targets, bottleneck, activation and form.
            dtype: dtype to store them in; None: the adapters' own if they agree, else float32.
            revision: revision of the Hub ids.
            token: token for the Hub.
            cache_dir: cache folder for files from the Hub.

        Raises:
            ConfigError: an adapter cannot be found or has a form that a pool does not support, or the adapters differ
                (the message lists each difference).
            FileFormatError: a file is missing or damaged, or is a pickle instead of safetensors.
        """
        folders = _folders(adapters, bottleneck.FILENAMES, HubOptions(revision, token, cache_dir))
        return cls(stack("bottleneck", [bottleneck.read_bottleneck(folder) for folder in folders], _checked(dtype)))

    @classmethod
    def from_adapters(
        cls,
        adapters: Sequence[PathLike],
        *,
        centre: bool = False,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: PathLike | None = None,
    ) -> AdapterPool:
        """A pool of LoRA or bottleneck adapters, whichever the first one is.

        Args:
            adapters: folders or Hub ids, all of one kind; see :meth:`from_lora` and :meth:`from_bottleneck`.
            centre: store the mean of the adapters as the common part, and the adapters as deviations from it; see
                :meth:`centred`.
            dtype: dtype to store them in; None: the adapters' own if they agree, else float32.
            revision: revision of the Hub ids.
            token: token for the Hub.
            cache_dir: cache folder for files from the Hub.

        Raises:
            ConfigError: see :meth:`from_lora`; or a single adapter that is to be centred.
            FileFormatError: a file is missing or damaged, or is a pickle instead of safetensors.
        """
        hub = HubOptions(revision, token, cache_dir)
        first = _folders(adapters, FILENAMES_OF_ADAPTERS, hub)[:1]
        is_lora = bool(first) and first[0].read_json(CONFIG_FILE).get("peft_type") == "LORA"
        make = cls.from_lora if is_lora else cls.from_bottleneck
        pool = make(adapters, dtype=dtype, revision=revision, token=token, cache_dir=cache_dir)
        return pool.centred() if centre else pool

    @classmethod
    def fit(cls, model: nn.Module, dataset: Any, *, profile_column: str = "user", **settings: Any) -> AdapterPool:
        """Fit a pool to the people or tasks of a dataset: what they share, and the directions in which they differ.

        The pool of :func:`peft_xmask.fit_pool`, which also returns the head that was trained with it.

        Args:
            model: a base, with the head of the data's labels. It is not modified.
            dataset: tokenised examples with labels and a column of names of people or tasks.
            profile_column: that column.
            settings: ``validation``, ``resume``, ``progress`` and the fields of :class:`peft_xmask.PoolFitting`, such
                as ``size`` and ``args``.

        Raises:
            ConfigError: see :func:`peft_xmask.fit_pool`.
        """
        from ..training.fit_pool import fit_pool  # the one import that points up: making a pool needs the Trainer

        return fit_pool(model, dataset, profile_column=profile_column, **settings).pool

    def centred(self) -> AdapterPool:
        """This pool with the mean of its adapters as the common part, and their deviations from it as directions.

        A mask then says how far a profile is from the mean, which costs it no bytes, and signs work: masks over a
        centred pool are ``"signed"`` by default. With ``mask_weighting="mean"`` a mask over the centred pool gives the
        adapter that it gives over this one, up to rounding (and with a gain of 1).

        Raises:
            ConfigError: a random pool, a pool with a common part, or one of a single adapter.
        """
        if not isinstance(self._adapters, TrainedAdapters) or self._common is not None:
            raise ConfigError(
                f"Only trained adapters without a common part can be centred, found {self!r}. For a random pool, give "
                "it a common part with `with_common`."
            )
        directions, common = centre_adapters(self._adapters)
        return AdapterPool(directions, common=common)

    def with_common(
        self,
        adapter: PathLike | nn.Module,
        *,
        adapter_name: str = "default",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: PathLike | None = None,
    ) -> AdapterPool:
        """This pool with an always-on adapter beside the mix: ``y + B_0 act(A_0 y) + B act(A y)``.

        Every profile has the common adapter in full, at no bytes; a row of -1 is the common adapter alone. Its
        bottleneck may have another width than the pool's. Over a random pool the profiles take its insertion form and
        activation, and are adapted at its sites.

        Args:
            adapter: folder or Hub id of a LoRA or bottleneck adapter, or a PEFT model that has one.
            adapter_name: which adapter of a model.
            revision: of the Hub id.
            token: token for the Hub.
            cache_dir: cache folder for files from the Hub.

        Raises:
            ConfigError: the pool has a common part already, or the adapter's form is another one or cannot be used.
            FileFormatError: a file is missing or damaged, or is a pickle instead of safetensors.
        """
        if self._common is not None:
            raise ConfigError(f"The pool has a common part already, '{self._common.source}'. Start from one without.")
        if isinstance(adapter, nn.Module):
            read = read_model(adapter, adapter_name)
        else:
            read = _read_adapter(find_folder(adapter, FILENAMES_OF_ADAPTERS, HubOptions(revision, token, cache_dir)))
        return AdapterPool(self._adapters, common=beside(self._adapters, read))

    @classmethod
    def from_pretrained(
        cls,
        pool_id: PathLike,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: PathLike | None = None,
        dtype: torch.dtype | None = None,
    ) -> AdapterPool:
        """Load a saved pool. Tensors are memory-mapped: read when used, and shared with other processes.

        Args:
            pool_id: folder, Hub id, or ``"owner/name@revision/subfolder"``, which a config can hold.
            revision: revision of the Hub id.
            subfolder: subfolder of the folder or Hub id.
            token: token for the Hub.
            cache_dir: cache folder for files from the Hub.
            dtype: dtype to hold them in; None: as stored.

        Raises:
            ConfigError: there is no such folder or Hub repository, or the dtype is not one of the three.
            FileFormatError: a file is damaged; the message names the damage.
            PoolMismatchError: the tensors do not have the recorded fingerprint.
        """
        hub = HubOptions(revision, token, cache_dir)
        folder = find_folder(pool_id, storage.FILENAMES, hub, subfolder)
        name = str(Path(pool_id) / (subfolder or "")) if Path(pool_id).is_dir() else folder.name
        adapters, common, fitting = storage.read_pool(folder, _checked(dtype))
        return cls(adapters, name, common, fitting)

    def save_pretrained(self, save_directory: PathLike) -> None:
        """Write the pool to a folder: ``pool.json``, a model card and, unless it is a seed alone, ``pool.safetensors``.

        Raises:
            ConfigError: ``save_directory`` is a file.
        """
        storage.write_pool(Path(save_directory), self._adapters, self._common, self._fitting)
        self._name_or_path = os.fspath(save_directory)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Upload the pool to a Hub repository, which is created if needed.

        Args:
            repo_id: ``owner/name``, or a name in the user's own namespace.
            private: whether a new repository is private; None: as the owner's settings say.
            token: token for the Hub.
            revision: branch to commit to, created if needed; None: the default branch.
            commit_message: None: a message with the fingerprint.

        Returns:
            The address of the commit.

        Raises:
            ConfigError: there is no token, or it may not write to the repository.
        """
        address, self._name_or_path = storage.upload_pool(
            self._adapters,
            self._common,
            self._fitting,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
        )
        return address

    def bind(self, sites: Sequence[Site]) -> list[PoolSlice]:
        """The pool's slice for each site, in order. Models that use the same pool share the tensors.

        A random pool identifies sites by position. A trained pool identifies them by name, where a prefix may differ;
        the numbers of sites must be equal.

        Raises:
            PoolMismatchError: the number, names or widths of the sites differ. No tensor has been created then.
        """
        with torch.inference_mode(False), torch.no_grad():
            directions = self._adapters.bind(sites)
            return directions if self._common is None else self._common.bind(sites, directions)

    @property
    def kind(self) -> str:
        """``"random"``, ``"lora"`` or ``"bottleneck"``."""
        return self._adapters.kind

    @property
    def num_adapters(self) -> int:
        """N."""
        return self._adapters.num_adapters

    @property
    def bottleneck_size(self) -> int:
        """Width b between the projections of a direction; of LoRA adapters, the rank."""
        return self._adapters.bottleneck_size

    @property
    def mixed_size(self) -> int:
        """Width between the projections of a mixed adapter: b, and that of a common adapter beside the mix."""
        beside_it = self._common is not None and not self._common.inside
        return self.bottleneck_size + (self._common.adapter.bottleneck_size if self._common and beside_it else 0)

    @property
    def common(self) -> CommonPart | None:
        """The always-on adapter; None if there is none."""
        return self._common

    @property
    def fitting(self) -> Fitting | None:
        """What the pool was fitted to, and the prior of masks over it; None for other pools."""
        return self._fitting

    @property
    def fingerprint(self) -> str:
        """Identifies the pool, whatever dtype it is held in. Profiles store it."""
        own = self._adapters.fingerprint
        return own if self._common is None else self._common.fingerprint_around(own)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tensors."""
        return self._adapters.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that must be stored and shipped: of trained adapters their tensors; of random ones 0, for a seed."""
        return self._adapters.nbytes + (0 if self._common is None else self._common.adapter.nbytes)

    @property
    def seed(self) -> int | None:
        """The seed of a random pool; None for other pools."""
        return self._adapters.seed

    @property
    def name_or_path(self) -> str | None:
        """Folder or Hub name under which the pool was last saved or from which it was loaded; None if neither.

        A Hub name includes the revision and subfolder, if any: ``"owner/name@revision/subfolder"``.
        """
        return self._name_or_path

    @property
    def insertion_form(self) -> str | None:
        """``"sequential"`` or ``"parallel"``; None: any (random)."""
        return self._form_of.insertion_form

    @property
    def activation(self) -> str | None:
        """Name of the activation; None: any (random)."""
        return self._form_of.activation

    @property
    def layer_norm(self) -> bool | None:
        """Whether a LayerNorm precedes the activation; None: either (random)."""
        return self._form_of.layer_norm

    @property
    def mask_weighting(self) -> str:
        """The weighting of masks over this pool unless a config names one: ``"signed"`` or ``"mean"``."""
        return self._adapters.mask_weighting

    @property
    def target_modules(self) -> list[str] | None:
        """Names of the sites, sorted; None: any (random)."""
        return self._form_of.target_modules

    @property
    def _form_of(self) -> RandomAdapters | TrainedAdapters:
        """What decides form and sites: a common part, where there is one."""
        return self._adapters if self._common is None else self._common.adapter

    def __eq__(self, other: object) -> bool:
        return self.fingerprint == other.fingerprint if isinstance(other, AdapterPool) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __copy__(self) -> AdapterPool:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterPool:
        return self

    def __repr__(self) -> str:
        seed = f", seed={self.seed}" if self.seed is not None else ""
        return (
            f"AdapterPool({self.kind}, num_adapters={self.num_adapters}, bottleneck_size={self.bottleneck_size}{seed}, "
            f"dtype={dtype_name(self.dtype)}, fingerprint={self.fingerprint}"
            f"{'' if self._common is None else f', common={self._common.source!r}'})"
        )


FILENAMES_OF_ADAPTERS = tuple(dict.fromkeys((*lora.FILENAMES, *bottleneck.FILENAMES)))


def _read_adapter(folder: Folder) -> TrainedAdapter:
    is_lora = folder.read_json(CONFIG_FILE).get("peft_type") == "LORA"
    return lora.read_lora(folder) if is_lora else bottleneck.read_bottleneck(folder)


def read_model(model: nn.Module, adapter_name: str) -> TrainedAdapter:
    """An adapter of a PEFT model, as it would be saved."""
    if adapter_name not in getattr(model, "peft_config", {}):
        raise ConfigError(
            f"Expected a PEFT model with an adapter '{adapter_name}', found a {type(model).__name__} without one."
        )
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved, selected_adapters=[adapter_name])  # type: ignore[operator]
        path = Path(saved) / ("" if adapter_name == "default" else adapter_name)
        read = _read_adapter(Folder(path, adapter_name))
        sites = {name: replace(site, **{p: t.clone() for p, t in site.parts()}) for name, site in read.sites.items()}
        return replace(read, sites=sites, source=f"adapter '{adapter_name}' of a model")


def _checked(dtype: torch.dtype | None) -> torch.dtype | None:
    return None if dtype is None else require_storage_dtype(dtype)


def _folders(adapters: Sequence[PathLike], filenames: Sequence[str], hub: HubOptions) -> list[Any]:
    if isinstance(adapters, (str, os.PathLike)):
        raise ConfigError(
            f"Expected a list of folders or Hub ids, found one: {os.fspath(adapters)!r}. Put it in a list."
        )
    return [find_folder(adapter, filenames, hub) for adapter in adapters]
