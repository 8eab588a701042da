"""Serve a bank of profiles from vLLM: each request names a person as its model.

``register`` is the entry point that vLLM calls in its API server, its engine and its workers. It does nothing unless
``PEFT_XMASK_VLLM_BANK`` names a bank. See docs/integrations/vllm.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...bank.bank import ProfileBank

__all__ = ["lora_request", "register"]


def register() -> None:
    """Set vLLM up to serve the bank that the environment names. vLLM calls this in each of its processes.

    Raises:
        ConfigError: a setting is invalid, or the bank cannot be served by vLLM.
        MergeError: the bank's profiles are not linear.
        FileFormatError: the bank is damaged.
    """
    from .settings import ServingSettings

    settings = ServingSettings.from_environment()
    if settings is not None:
        from .plugin import install

        install(settings)


def lora_request(bank: ProfileBank, name: str) -> Any:
    """A ``LoRARequest`` for a profile, for vLLM's offline ``LLM`` in a process where the plugin is set up.

    Args:
        bank: the one that ``PEFT_XMASK_VLLM_BANK`` names, or one with the same settings.
        name: of the profile.

    Raises:
        KeyError: no such profile.
        MaskFormatError: its masks are damaged.
    """
    from .offline import request_for

    return request_for(bank, name)
