"""What :func:`peft_xmask.integrations.vllm.register` does where a bank is to be served."""

from __future__ import annotations

import vllm
from vllm.logger import init_logger
from vllm.lora.resolver import LoRAResolverRegistry

from .bank_source import BankSource
from .resolver import ProfileResolver
from .settings import ServingSettings
from .versions import mode_for

LOG = init_logger("vllm.peft_xmask")
RESOLVER = "peft_xmask"


def install(settings: ServingSettings) -> None:
    """Register the resolver and, in memory mode, the worker side. Doing it twice does no harm.

    Raises:
        ConfigError, MergeError, FileFormatError: the bank cannot be served; see :class:`BankSource`.
    """
    if RESOLVER in LoRAResolverRegistry.get_supported_resolvers():
        return
    source = BankSource(settings.bank)
    mode = mode_for(settings.mode, vllm.__version__)
    if mode == "memory":
        from . import api_server, worker

        resolver = ProfileResolver(source, source.find)
        worker.install(source, settings)
        api_server.install(resolver, settings)
    else:
        from .folders import FolderStore

        store = FolderStore(source, settings)
        resolver = ProfileResolver(source, store.find)
        LOG.warning(
            "peft_xmask was not tested with vLLM %s, or folder mode was asked for: profiles are written as LoRA "
            "folders to %s. A profile that changes in the bank is served when its name was unloaded.",
            vllm.__version__,
            settings.folder,
        )
    LoRAResolverRegistry.register_resolver(RESOLVER, resolver)
    LOG.info("peft_xmask serves %s from %s (%s mode).", source.kind(), settings.bank, mode)
