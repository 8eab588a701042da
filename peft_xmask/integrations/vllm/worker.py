"""Memory mode, worker: LoRAs baked from the masks in a request's path. No file is read."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from vllm.logger import init_logger
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager
from vllm.platforms import current_platform

from ...bank.bake import LoraBaker
from ...core.hub import HubOptions
from ...core.lora import KEY_PREFIX
from ...errors import ConfigError
from . import cpu_kernels
from .bank_source import BankSource
from .lora_path import is_profile, profile_at
from .ranks import fitting_rank
from .settings import ServingSettings

LOG = init_logger("vllm.peft_xmask")


def install(source: BankSource, settings: ServingSettings) -> None:
    """Have the workers of this process bake profiles, and tell two versions of one profile apart."""
    plain = WorkerLoRAManager._load_adapter

    def load(self: Any, request: Any) -> Any:
        if not is_profile(request.lora_path):
            return plain(self, request)
        return self._peft_xmask.load(request)

    WorkerLoRAManager._load_adapter = load
    for cls in (WorkerLoRAManager, LRUCacheWorkerLoRAManager):
        cls.create_lora_manager = _opening(cls.create_lora_manager, source, settings)
    # vLLM compares requests by name alone, and collects those of a batch in a set: of two versions of one profile in a
    # batch it would load one and stop with an error when it looks for the other.
    LoRARequest.__eq__ = _same_request


def _same_request(request: Any, other: object) -> bool:
    return (
        isinstance(other, LoRARequest)
        and request.lora_name == other.lora_name
        and request.lora_int_id == other.lora_int_id
    )


def _opening(create: Callable[..., Any], source: BankSource, settings: ServingSettings) -> Callable[..., Any]:
    def create_lora_manager(self: Any, model: Any, vllm_config: Any) -> Any:
        wrapped = create(self, model, vllm_config)
        if current_platform.is_cpu():
            cpu_kernels.fix()
        self._peft_xmask = ProfileLoader(self, vllm_config, source, settings)
        return wrapped

    return create_lora_manager


class ProfileLoader:
    """Makes vLLM's LoRA models of profiles. It is made when the worker starts, with the pool and all checks.

    Args:
        manager: vLLM's, of this worker, ready.
        vllm_config: of the server.
        source: the bank.
        settings: of the plugin.

    Raises:
        ConfigError: a bank that vLLM cannot serve, or not with these flags.
        BaseMismatchError, PoolMismatchError: the profiles were trained on another base or pool.
    """

    def __init__(self, manager: Any, vllm_config: Any, source: BankSource, settings: ServingSettings) -> None:
        start = time.perf_counter()
        self._manager = manager
        served = vllm_config.model_config
        hub = HubOptions(revision=served.revision, cache_dir=vllm_config.load_config.download_dir)
        self._baker = LoraBaker(source.kind(), settings.base or served.model, check_base=settings.check_base, hub=hub)
        self._digest = source.digest
        if self._baker.has_bias:
            raise ConfigError(
                "These profiles have biases as LoRAs (those of the pool or, of sequential profiles, those of the "
                'base\'s modules), which vLLM does not serve. Train them with insertion_form="parallel" over a pool '
                "without biases."
            )
        self._refuse_rank(manager.lora_config.max_lora_rank)
        names = [module.name for module in self._baker.modules]
        self._helper = PEFTHelper(r=self._baker.rank, lora_alpha=self._baker.rank, target_modules=names)
        self._helper.validate_legal(manager.lora_config)
        self._refuse_modules(names, vllm_config.parallel_config.pipeline_parallel_size)
        LOG.info(
            "peft_xmask: %d modules of rank %d are ready after %.1f s.",
            len(names),
            self._baker.rank,
            time.perf_counter() - start,
        )

    def load(self, request: Any) -> Any:
        """VLLM's LoRA model of the profile in a request's path.

        Raises:
            PoolMismatchError, FileFormatError, MaskFormatError: not a profile of this bank.
        """
        lora = self._baker.bake(profile_at(request.lora_path, self._baker.spec, self._digest))
        return self._manager._lora_model_cls.from_lora_tensors(
            request.lora_int_id,
            lora.tensors,
            self._helper,
            device="cpu",
            dtype=self._manager.lora_config.lora_dtype,
            weights_mapper=self._mapper(),
            skip_prefixes=getattr(self._model, "lora_skip_prefixes", None),
        )

    @property
    def _model(self) -> Any:
        return self._manager._adapter_manager.model

    def _mapper(self) -> Any:
        mapper = getattr(self._model, "hf_to_vllm_mapper", None)
        return None if mapper is None else mapper.get_rename_mapper()

    def _refuse_rank(self, limit: int) -> None:
        rank = self._baker.rank
        if rank > limit:
            raise ConfigError(
                f"These profiles have rank {rank}; the server takes up to {limit}. Start it with --max-lora-rank "
                f"{fitting_rank(rank)}."
            )

    def _refuse_modules(self, names: Sequence[str], pipeline_size: int) -> None:
        """VLLM passes over modules that it does not adapt, without a word: answers would be those of the base."""
        manager = self._manager._adapter_manager
        adapted = set(manager.modules) | {part for parts in manager.packed_modules.values() for part in parts}
        theirs = [parse_fine_tuned_lora_name(f"{KEY_PREFIX}{name}.lora_A.weight", self._mapper())[0] for name in names]
        missing = [name for name in theirs if name not in adapted and f"model.{name}" not in adapted]
        if missing and pipeline_size == 1:
            suffixes = " ".join(sorted({name.rpartition(".")[2] for name in theirs}))
            raise ConfigError(
                f"These profiles adapt {len(missing)} modules that the server does not, such as '{missing[0]}'. Start "
                f"it with --lora-target-modules {suffixes}, or without that flag."
            )
