"""The bank on disk as it is now: opened again when its files were replaced."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

from ...bank.bake import refuse_nonlinear
from ...bank.bank import ProfileBank
from ...bank.storage import FILENAMES
from ...core.hub import HubOptions, find_folder
from ...errors import ConfigError, FileFormatError, PoolMismatchError
from .lora_path import path_of, settings_digest

Stamp = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True)
class FoundProfile:
    """A profile's path, and the version of the bank it comes from."""

    path: str
    version: int


class BankSource:
    """A bank that is watched. It may be used from several threads.

    Args:
        where: folder or Hub id of a bank.

    Raises:
        ConfigError: no such folder, or a bank that vLLM cannot serve.
        MergeError: profiles that are not linear.
        FileFormatError: a damaged bank.
    """

    def __init__(self, where: str) -> None:
        self._folder = find_folder(where, FILENAMES, HubOptions()).path
        self._lock = threading.Lock()
        self._stamp = self._stamp_now()
        self._bank: ProfileBank | None = ProfileBank.from_pretrained(self._folder)
        refuse_unservable(self._bank)
        self.digest = settings_digest(self._bank.config, self._bank.spec)
        self.version = 1

    def bank(self) -> ProfileBank:
        """The bank that is in the folder now.

        Raises:
            FileFormatError: it is missing or damaged.
            ConfigError, MergeError, PoolMismatchError: it is not one that this server can serve.
        """
        return self._current()[0]

    def find(self, name: str) -> FoundProfile | None:
        """A profile by name; None if there is none.

        Raises:
            FileFormatError: the bank is missing or damaged, or this profile is.
            ConfigError, MergeError, PoolMismatchError: the bank is not one that this server can serve.
        """
        bank, version = self._current()
        return FoundProfile(path_of(bank, name), version) if name in bank else None

    def _current(self) -> tuple[ProfileBank, int]:
        with self._lock:
            stamp = self._stamp_now()
            if stamp != self._stamp or self._bank is None:
                self._bank = None  # until the new one has been opened: a damaged bank is not served
                opened = self._opened()
                self._stamp, self._bank, self.version = stamp, opened, self.version + 1
            return self._bank, self.version

    def _opened(self) -> ProfileBank:
        try:
            bank = ProfileBank.from_pretrained(self._folder)
        except OSError as error:
            raise FileFormatError(f"The bank in '{self._folder}' cannot be read: {error}") from error
        refuse_unservable(bank)
        digest = settings_digest(bank.config, bank.spec)
        if digest != self.digest:
            raise PoolMismatchError(
                f"The bank in '{self._folder}' was replaced by one with other settings ({digest}, not {self.digest}). "
                "Restart the server to serve a bank of another pool or base.",
                expected=self.digest,
                found=digest,
            )
        return bank

    def _stamp_now(self) -> Stamp:
        """What changes when a file of the bank is written or replaced. A few microseconds."""
        try:
            with os.scandir(self._folder) as entries:
                found = [(entry.name, entry.stat()) for entry in entries if not entry.name.startswith(".")]
        except OSError:
            return ()
        return tuple(sorted((name, each.st_ino, each.st_size, each.st_mtime_ns) for name, each in found))


def refuse_unservable(bank: ProfileBank) -> None:
    """Refuse a bank that vLLM cannot serve, as far as its own files say.

    Raises:
        MergeError: profiles that are not linear or have offsets.
        ConfigError: a bank with a head of its own.
    """
    refuse_nonlinear(bank)
    if bank.shared:
        raise ConfigError(
            f"This bank has modules that are saved whole ({', '.join(sorted(bank.shared))}), which vLLM cannot load "
            "with an adapter. Serve it with ProfileBank.attach (docs/examples/serve.py)."
        )
