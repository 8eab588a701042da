"""From the name in a request to a ``LoRARequest``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from ...errors import PeftXMaskError
from .bank_source import BankSource, FoundProfile

LOG = init_logger("vllm.peft_xmask")
UNSET_ID = 1
"""vLLM puts an id of its own in its place."""


class ProfileResolver(LoRAResolver):
    """Finds profiles of a bank by name.

    For a name without a profile the result is None, which vLLM turns into a 404 for that request. An exception would
    be a 500.

    Args:
        source: the bank.
        find: what is called with a name: gives its path, or None.
    """

    def __init__(self, source: BankSource, find: Callable[[str], FoundProfile | None]) -> None:
        self.source = source
        self._find = find
        self.on_found: Callable[[str, FoundProfile], None] | None = None

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The request for a name; None if there is no such profile, or it cannot be served now."""
        found = await asyncio.to_thread(self.find, lora_name)
        if found is None:
            return None
        if self.on_found is not None:
            self.on_found(lora_name, found)
        return LoRARequest(lora_name=lora_name, lora_int_id=UNSET_ID, lora_path=found.path)

    def find(self, name: str) -> FoundProfile | None:
        """A profile's path; None, and a line in the log, where it cannot be served."""
        try:
            return self._find(name)
        except (PeftXMaskError, KeyError, OSError) as error:
            LOG.error("Cannot serve the profile %r: %s: %s", name, type(error).__name__, error)
            return None
