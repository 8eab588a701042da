"""The tuner of X-PEFT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from ...core.masks import require
from ...core.sites import Site, partners
from ...errors import ConfigError, FileFormatError, PoolMismatchError
from ...pool import AdapterPool, PoolSlice
from ..base.peft_private import accept_rows, register
from ..base.tuner import Injection
from ..sites.config import SiteConfig
from ..sites.layer import SiteLayer
from ..sites.places import device_of
from ..sites.tuner import SiteTuner
from .cache import MixedAdapterCache
from .config import XPEFTConfig
from .keys import BITS, GAIN, GAIN_BITS, LOGITS, OFFSET_BITS, PARTS, TABLE, ending
from .layer import XPEFTLayer, XPEFTSite
from .masks import BASE, AdapterMasks, Names
from .offset import set_offsets
from .passes import OF_THREAD, BatchRows
from .table import MaskTable, XPEFTModule, begin_forward, end_forward, find_table, load_served_state


@dataclass
class XPEFTInjection(Injection):
    """What is found out while an X-PEFT adapter is being put into a model.

    Attributes:
        pool: of the adapter.
        pool_names_targets: whether the targets are the pool's sites, which the model may name from another root.
    """

    pool: AdapterPool | None = None
    pool_names_targets: bool = False


class XPEFTModel(SiteTuner):
    """Puts a slice of a frozen pool on every site and one mask table at the root of a model.

    Made by ``get_peft_model(model, XPEFTConfig(...))``.
    """

    prefix = "xpeft_"
    tuner_layer_cls = XPEFTModule
    layer_cls = XPEFTLayer
    injection_cls = XPEFTInjection
    _injection: XPEFTInjection

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        """Resolve the pool first: it knows sizes, defaults and, if it was trained, where its adapters belong."""
        pool = self._injection.pool = peft_config.resolve_pool(self.model)
        _check_pool(peft_config, pool)
        if peft_config.target_modules is None and pool.target_modules is not None:
            self._injection.pool_names_targets = True
            peft_config.target_modules = set(pool.target_modules)
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """A pool's sites may be named from another root: take the names they have in this model."""
        if self._injection.pool_names_targets:
            names = [name for name, _ in model.named_modules() if name]
            present = sorted(peft_config.target_modules)
            found = {name for name, same in zip(names, partners(names, present), strict=True) if same}
            peft_config.target_modules = found or peft_config.target_modules
        super()._prepare_model(peft_config, model)

    def _prepare_sites(self, config: SiteConfig, model: nn.Module, sites: list[Site]) -> dict[str, XPEFTSite]:
        assert isinstance(config, XPEFTConfig)
        present = getattr(model, TABLE, None)
        if present is not None and not isinstance(present, MaskTable):
            raise ConfigError(
                f"The base model has an attribute '{TABLE}' of its own ({type(present).__name__}), where X-PEFT keeps "
                "its masks. Wrap the model in another module."
            )
        pool = self._injection.pool
        assert pool is not None
        slices = pool.bind(sites)
        config.pool_fingerprint = pool.fingerprint
        return {
            site.name: XPEFTSite(part, index, config.form)
            for index, (site, part) in enumerate(zip(sites, slices, strict=True))
        }

    def _add_to_layer(self, layer: SiteLayer, config: SiteConfig, adapter_name: str, part: XPEFTSite) -> None:
        assert isinstance(layer, XPEFTLayer)
        assert isinstance(config, XPEFTConfig)
        if part.index == 0:
            self._add_to_table(config, adapter_name, layer)
        part.pool = _shared(layer, part.pool)
        layer.add(adapter_name, part, self.table)

    def _add_to_table(self, config: XPEFTConfig, adapter_name: str, first: XPEFTLayer) -> None:
        """Done at the first site: before it, PEFT has not yet decided that the base is to be frozen."""
        if not hasattr(self.model, TABLE):
            table = MaskTable()
            table.train(self.model.training)
            setattr(self.model, TABLE, table)
            table.hooks = [
                self.model.register_forward_pre_hook(begin_forward, with_kwargs=True),
                self.model.register_forward_hook(end_forward, always_call=True),
                self.model.register_load_state_dict_pre_hook(load_served_state),
            ]
        masks = AdapterMasks(
            adapter_name,
            config.mask_spec(len(self._injection.parts)),
            trainable=not config.inference_mode,
            logit_scale=config.logit_scale,
            temperature=config.temperature,
            gumbel_noise=config.gumbel_noise,
            fitting=None if self._injection.pool is None else self._injection.pool.fitting,
        )
        self.table.add(masks)
        if self._injection.copied_from is not None:  # trl's reference adapter, for which it copies parameters only
            masks.copy_bytes(self.table.adapters[self._injection.copied_from])
        device = device_of(first.get_base_layer())
        if device is not None and device.type != "cpu":
            self.table.to(device)
        weight = getattr(first.get_base_layer(), "weight", None)
        if isinstance(weight, Tensor) and weight.dtype in (torch.float16, torch.bfloat16):
            masks.cast(weight.dtype)  # PEFT casts it back unless autocast_adapter_dtype=False

    @property
    def table(self) -> MaskTable:
        """The mask table of the model."""
        table: MaskTable = getattr(self.model, TABLE)
        return table

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """The pool, named as in a PeftModel: each process has made or loaded it, so DDP need not send it every pass."""
        names = [name for name, _ in self.named_buffers(remove_duplicate=False)]
        return [f"base_model.{name}" for name in names if ".xpeft_sites." in name]

    def set_profile(self, profile: int | str, adapter_name: str | None = None) -> None:
        """Choose which of an adapter's profiles serves from now on. O(1): no module is visited.

        The choice holds for the calling context: this thread, or this asyncio task. Others do not see it, so threads
        that share a model can serve different profiles. A thread that was started later has made no choice yet.

        Args:
            profile: its row, from 0 to ``num_profiles - 1``; or its name, where the adapter is a bank's; -1 or
                ``"__base__"`` for nobody: the base, with the common adapter and the head that the profiles share.
            adapter_name: None: the active adapter.

        Raises:
            ConfigError: no such profile, no such adapter, or the adapter is merged.
        """
        if self.table.merged:
            raise ConfigError("Cannot choose a profile while an adapter is merged. Call unmerge_adapter() first.")
        masks = self.masks(adapter_name)
        masks.choose(int(masks.find_rows([profile])[0]) if isinstance(profile, str) else profile)

    def cache_profiles(self, max_bytes: int, adapter_name: str | None = None) -> None:
        """Keep the mixed adapters of the profiles that were used last, so that these need no mixing again.

        For evaluation of models that are not compiled: profiles that train are mixed in each pass, and so is a batch of
        more profiles than there is room for. Outputs are those without a cache up to rounding: profiles that are mixed
        at once are mixed by another kernel than one alone.

        Args:
            max_bytes: for the mixed adapters that are kept, in the dtype of the pool; those of the batch at hand come
                on top. 0: nothing is kept.
            adapter_name: None: the active adapter.

        Raises:
            ConfigError: no such adapter, or ``max_bytes`` is no whole number or too small for one profile.
        """
        masks = self.masks(adapter_name)
        layers = [module for module in self.model.modules() if isinstance(module, XPEFTLayer)]
        sites = [layer.xpeft_sites[masks.name] for layer in layers if masks.name in layer.xpeft_sites]
        sites.sort(key=lambda site: site.index)
        masks.cache = MixedAdapterCache(sites, max_bytes)

    def masks(self, adapter_name: str | None = None) -> AdapterMasks:
        """The masks of one adapter: ``model.masks().logits.weight`` are its trained logits, ``bits`` its stored masks.

        Args:
            adapter_name: None: the active adapter.

        Raises:
            ConfigError: the model has no adapter of that name.
        """
        name = adapter_name or self.active_adapters[0]
        if name not in self.table.adapters:
            raise ConfigError(f"No adapter '{name}' in this model. Known: {', '.join(sorted(self.table.adapters))}.")
        return self.table.adapters[name]

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """``adapter_names`` may be rows of the active adapter, one for each example; in training too.

        A LongTensor or a list of whole numbers, -1 for nobody, or names of profiles, where the adapter is a bank's, and
        ``"__base__"`` for nobody: the base, with the common adapter and the head that the profiles share. With
        ``num_beams`` one for each prompt. Of several active adapters, rows are those of the first. They hold for this
        call in this thread.
        """
        batch = self._batch_rows(kwargs.get("adapter_names"), kwargs.get("num_beams") or 1)
        before, outer = OF_THREAD.batch, OF_THREAD.now
        OF_THREAD.batch = batch
        try:
            if batch is not None:
                kwargs["adapter_names"] = None
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
        finally:
            OF_THREAD.batch, OF_THREAD.now = before, outer

    def _batch_rows(self, chosen: Any, beams: int) -> BatchRows | None:
        """Rows for what is passed as ``adapter_names``, unless it is None or names of adapters."""
        if not isinstance(chosen, Tensor) and not (isinstance(chosen, (list, tuple)) and chosen):
            return None
        masks = self.table.adapters.get(self.active_adapters[0]) if self.active_adapters else None
        if isinstance(chosen, Tensor):
            rows = chosen
        elif all(isinstance(each, int) and not isinstance(each, bool) for each in chosen):
            rows = torch.tensor(chosen)
        elif masks is None or masks.names is None or _are_adapters(chosen, self.peft_config, masks.names):
            return None
        else:
            rows = masks.find_rows(chosen)
        if masks is None:
            raise ConfigError(
                "Cannot choose profiles by `adapter_names`: no adapter is active. Call set_adapter first."
            )
        self._refuse_merged()
        _check_rows(rows, masks.spec.num_profiles)
        return BatchRows(self.table, masks, rows, beams)

    def _unload_and_optionally_merge(self, *args: Any, merge: bool = True, **kwargs: Any) -> Any:
        offsets = [name for name in self.active_adapters if name in self.table.xpeft_offset_bits]
        if merge and offsets:
            raise ConfigError(
                f"Adapter '{offsets[0]}' adds offsets to the outputs, which no weight of the base can hold. Serve it "
                "unmerged, or use merge_adapter(), which keeps the adapter."
            )
        kwargs["merge"] = merge
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)  # type: ignore[func-returns-value]
        for hook in self.table.hooks:
            hook.remove()
        delattr(model, TABLE)
        return model

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """What is saved: the masks (and gains) as bytes, packed from the logits where there are any."""
        entries = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        masks = find_table(model).adapters[adapter_name]
        keys = {part: _key_of(entries, ending(part, adapter_name)) for part in PARTS}
        found = {part: entries[key] for part, key in keys.items() if key is not None}
        if LOGITS in found:
            found[BITS], found[GAIN_BITS] = masks.form.pack(found[LOGITS], found.get(GAIN))
        parts = [
            BITS,
            *([GAIN_BITS] if masks.spec.learn_gain else []),
            *([OFFSET_BITS] if OFFSET_BITS in found else []),
        ]
        return {keys[part]: found[part] for part in parts}  # type: ignore[misc]  # both are always there

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check the bytes of a file before any tensor reaches the model; for training, rebuild logits from them."""
        table = find_table(model)
        masks = table.adapters[adapter_name]
        bits_key, gain_key = (_key_of(state_dict, ending(part)) for part in (BITS, GAIN_BITS))
        learn_gain = masks.spec.learn_gain
        if bits_key is None or (gain_key is None) == learn_gain:
            expected = f"{BITS} and {GAIN_BITS}" if learn_gain else f"{BITS} alone"
            raise FileFormatError(
                f"Expected {expected} of a '{TABLE}' in the adapter file, found {sorted(state_dict) or 'nothing'}. The "
                "file is damaged, or adapter_config.json (learn_gain) is of another one."
            )
        bits = state_dict[bits_key]
        gain_bits = None if gain_key is None else state_dict[gain_key]
        masks.spec.check(bits, gain_bits)
        if bits.shape[0] != masks.spec.num_profiles:
            raise FileFormatError(
                f"Expected masks of {masks.spec.num_profiles} profiles, found {bits.shape[0]}. The file is damaged, or "
                "adapter_config.json (num_profiles) is of another one."
            )
        state_dict = dict(state_dict)
        offset_key = _key_of(state_dict, ending(OFFSET_BITS))
        set_offsets(model, table, adapter_name, None if offset_key is None else state_dict[offset_key].clone())
        if masks.is_trained:
            logits, gain = masks.form.unpack(bits, gain_bits)
            state_dict[bits_key.replace(BITS, LOGITS)] = logits
            state_dict[bits_key] = torch.zeros_like(bits)
            if gain_key is not None and gain is not None:
                state_dict[gain_key.replace(GAIN_BITS, GAIN)] = gain
                state_dict[gain_key] = torch.zeros_like(state_dict[gain_key])
            masks.rebuilt = True
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _are_adapters(chosen: Sequence[Any], adapters: Mapping[str, Any], profiles: Names) -> bool:
    """Whether names are those of adapters, where profiles have names too. A person called like an adapter is a person.

    ``"__base__"`` alone is a profile: in a batch with others it is one, and an answer must not depend on the others.
    """
    named = {each for each in chosen if each != BASE}
    return bool(named) and all(each in adapters and profiles.find(each) is None for each in named)


def _check_rows(rows: Tensor, count: int) -> None:
    expected = f"Expected adapter_names as a LongTensor of rows from 0 to {count - 1} (-1: none), one for each example"
    if rows.dtype != torch.long or rows.dim() != 1:
        raise ConfigError(f"{expected}; found {rows.dtype} of shape {tuple(rows.shape)}.")
    known = ((rows >= -1) & (rows < count)).all()
    if torch.compiler.is_compiling():
        require(known, ConfigError(f"{expected}; found another row."))
    elif not known:
        raise ConfigError(f"{expected}; found {rows[:8].tolist()}.")


def _key_of(state_dict: dict[str, Tensor], end: str) -> str | None:
    return next((key for key in state_dict if key.endswith(end)), None)


def _shared(layer: XPEFTLayer, part: PoolSlice) -> PoolSlice:
    """The slice that an earlier adapter of the same pool already has at this site, if any."""
    for site in layer.xpeft_sites.values():
        if site.pool.origin == part.origin:
            present: PoolSlice = site.pool
            return present
    return part


def _check_pool(config: XPEFTConfig, pool: AdapterPool) -> None:
    expected = config.pool_fingerprint
    if expected is not None and pool.fingerprint != expected:
        raise PoolMismatchError(
            f"This profile was trained on the pool with fingerprint {expected}; the pool at hand ({pool!r}) has "
            f"{pool.fingerprint}. Its config names the pool {config.pool!r}: load that one, or set config.pool to it.",
            expected=expected,
            found=pool.fingerprint,
        )
    wanted = {"insertion_form": pool.insertion_form, "activation": pool.activation, "layer_norm": pool.layer_norm}
    for name, value in wanted.items():
        if value is not None and getattr(config, name) != value:
            raise PoolMismatchError(
                f"The adapters of this {pool.kind} pool were made with {name}={value!r}; the config says "
                f"{name}={getattr(config, name)!r}. Pass {name}={value!r} to XPEFTConfig.",
                expected=value,
                found=getattr(config, name),
            )


register("xpeft", XPEFTConfig, XPEFTModel)
accept_rows()
