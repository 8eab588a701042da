"""Settings of the plugin, from environment variables: vLLM gives its plugins no other way."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import ConfigError

PREFIX = "PEFT_XMASK_VLLM_"
MODES = ("auto", "memory", "folder")
_KNOWN = ("BANK", "MODE", "BASE", "CHECK_BASE", "FOLDER", "MAX_NAMES", "WATCH_SECONDS")


@dataclass(frozen=True)
class ServingSettings:
    """What the plugin serves and how.

    Args:
        bank: folder or Hub id (``PEFT_XMASK_VLLM_BANK``).
        mode: ``"memory"``: workers make adapters in memory, which uses vLLM's internals; ``"folder"``: adapters are
            written as LoRA folders, which uses its public interface alone; ``"auto"``: memory where the version of vLLM
            was tested (``_MODE``).
        base: folder of the base model, if it is not the model that vLLM serves (``_BASE``).
        check_base: whether the base's fingerprint is checked when the server starts (``_CHECK_BASE``: 1 or 0).
        folder: where folder mode writes (``_FOLDER``).
        max_names: how many names are remembered by the API server (``_MAX_NAMES``); those used last stay.
        watch_seconds: how often the bank's files are looked at for a new version (``_WATCH_SECONDS``).

    Raises:
        ConfigError: an invalid value.
    """

    bank: str
    mode: str = "auto"
    base: str | None = None
    check_base: bool = True
    folder: Path = Path("/dev/shm/peft-xmask")
    max_names: int = 10_000
    watch_seconds: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"{PREFIX}MODE={self.mode!r} is invalid: expected one of {', '.join(MODES)}.")
        if self.max_names < 1:
            raise ConfigError(f"{PREFIX}MAX_NAMES={self.max_names} is invalid: expected at least 1.")
        if not self.watch_seconds > 0:
            raise ConfigError(f"{PREFIX}WATCH_SECONDS={self.watch_seconds} is invalid: expected more than 0.")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> ServingSettings | None:
        """Read the settings; None if no bank is named.

        Raises:
            ConfigError: an unknown variable with our prefix, or an invalid value.
        """
        found = os.environ if environment is None else environment
        given = {name.removeprefix(PREFIX): value for name, value in found.items() if name.startswith(PREFIX)}
        if unknown := sorted(set(given) - set(_KNOWN)):
            known = ", ".join(PREFIX + name for name in _KNOWN)
            raise ConfigError(f"Unknown environment variable {PREFIX}{unknown[0]}. Known: {known}.")
        if not given.get("BANK"):
            return None
        return cls(
            bank=given["BANK"],
            mode=given.get("MODE", "auto"),
            base=given.get("BASE") or None,
            check_base=_flag("CHECK_BASE", given.get("CHECK_BASE", "1")),
            folder=Path(given.get("FOLDER", "/dev/shm/peft-xmask")),
            max_names=int(_number("MAX_NAMES", given.get("MAX_NAMES", "10000"))),
            watch_seconds=_number("WATCH_SECONDS", given.get("WATCH_SECONDS", "1")),
        )


def _flag(name: str, value: str) -> bool:
    if value not in ("0", "1"):
        raise ConfigError(f"{PREFIX}{name}={value!r} is invalid: expected 0 or 1.")
    return value == "1"


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"{PREFIX}{name}={value!r} is invalid: expected a number.") from None
