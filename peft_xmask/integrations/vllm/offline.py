"""Profiles for vLLM's offline ``LLM``."""

from __future__ import annotations

import hashlib
import threading

from vllm.lora.request import LoRARequest

from ...bank.rows import BankRows
from .lora_path import path_of, settings_digest

_FIRST_ID = 1 << 30
"""Ids are 32-bit numbers in vLLM; those below are left to LoRAs that the caller numbers."""

_IDS: dict[bytes, int] = {}
_LOCK = threading.Lock()


def request_for(bank: BankRows, name: str) -> LoRARequest:
    """The request for a profile. The same masks have the same id, other masks another one.

    Raises:
        KeyError: no such profile.
        MaskFormatError: its masks are damaged.
    """
    path = path_of(bank[name], settings_digest(bank.config, bank.spec))
    key = hashlib.blake2b(path.encode(), digest_size=16).digest()
    with _LOCK:
        number = _IDS.setdefault(key, _FIRST_ID + len(_IDS))
    return LoRARequest(lora_name=name, lora_int_id=number, lora_path=path)
