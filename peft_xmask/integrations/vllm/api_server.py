"""Memory mode, API server: forget unused names, and update profiles that change in the bank."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from vllm import envs
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from ...errors import ConfigError, MaskFormatError, PeftXMaskError
from .bank_source import BankSource, FoundProfile
from .resolver import ProfileResolver
from .served import LockTable, ServedProfiles
from .settings import PREFIX, ServingSettings

LOG = init_logger("vllm.peft_xmask")


def install(resolver: ProfileResolver, settings: ServingSettings) -> None:
    """If this process is the API server, make it use our table of adapters."""
    plain: Callable[..., None] = OpenAIServingModels.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        _refuse_settings(self)
        served = ServedProfiles(self.lora_requests, settings.max_names)
        self.lora_requests = served
        self.lora_resolver_lock = LockTable()
        watcher = Watcher(resolver.source, served, lambda: int(self.lora_id_counter.inc(1)), settings.watch_seconds)
        resolver.on_found = watcher.note

    OpenAIServingModels.__init__ = init


class Watcher:
    """Updates the served profiles to the bank's current masks.

    Args:
        source: the bank.
        served: the API server's table.
        next_id: a number for an adapter that has none yet.
        seconds: interval between checks of the bank's files.
    """

    def __init__(self, source: BankSource, served: ServedProfiles, next_id: Callable[[], int], seconds: float) -> None:
        self._source, self._served, self._next_id, self._seconds = source, served, next_id, seconds
        self._task: asyncio.Task[None] | None = None
        self._failure = ""

    def note(self, name: str, found: FoundProfile) -> None:
        """Note that a profile is about to be loaded. The first call starts watching the bank."""
        self._served.note(name, found)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._watch())

    async def look(self) -> None:
        """Check the bank once, and update the profiles that come from an older version.

        A profile that changed gets a request of its own: another path and another number. Requests that are being
        answered keep the old one. A profile that is gone is forgotten; one that is damaged stays as it was.
        """
        try:
            version = await asyncio.to_thread(self._source.version)
            names = self._served.outdated(version)
            found = await asyncio.to_thread(self._look_up, names)
        except (PeftXMaskError, OSError) as error:
            if str(error) != self._failure:  # said once
                LOG.error("The bank cannot be read; profiles stay as they are: %s", error)
            self._failure = str(error)
            return
        self._failure = ""
        for name, profile in found.items():
            if name not in self._served:  # forgotten meanwhile
                continue
            request = dict.__getitem__(self._served, name)
            if profile is None:
                del self._served[name]
                continue
            if isinstance(profile, FoundProfile) and request.lora_path != profile.path:
                request = LoRARequest(lora_name=name, lora_int_id=self._next_id(), lora_path=profile.path)
            self._served.update_profile(name, request, version)
        if found:
            LOG.info("The bank was replaced: %d served profiles looked up again.", len(found))

    def _look_up(self, names: list[str]) -> dict[str, FoundProfile | MaskFormatError | None]:
        found: dict[str, FoundProfile | MaskFormatError | None] = {}
        for name in names:
            try:
                found[name] = self._source.find(name)
            except MaskFormatError as error:
                LOG.error("The profile %r is damaged in the new bank; the old one is served: %s", name, error)
                found[name] = error
        return found

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            try:
                await self.look()
            except Exception:  # the watch goes on, whatever one look finds
                LOG.exception("Looking at the bank failed.")


def _refuse_settings(models: Any) -> None:
    if getattr(getattr(models.engine_client, "vllm_config", None), "lora_config", True) is None:
        raise ConfigError(f"{PREFIX}BANK is set, and the server was started without --enable-lora. Add it.")
    if not envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        raise ConfigError(
            f"{PREFIX}BANK is set, and VLLM_ALLOW_RUNTIME_LORA_UPDATING is not: vLLM would never ask for a profile. "
            "Set it to 1, and keep /v1/load_lora_adapter and /v1/unload_lora_adapter from the outside."
        )
