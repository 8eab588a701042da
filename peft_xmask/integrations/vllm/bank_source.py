"""The current bank on disk: a frozen bank is reopened when its file is replaced, a live bank reports its changes."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

from ...bank.bake import refuse_nonlinear
from ...bank.bank import ProfileBank
from ...bank.live import LiveBank, is_live_bank
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
    """A bank that is watched for changes. Threads can share it.

    Args:
        where: folder or Hub id of a bank, or folder of a live bank.

    Raises:
        ConfigError: no such folder, or a bank that vLLM cannot serve.
        MergeError: the profiles cannot be written as a LoRA.
        FileFormatError: a damaged bank.
    """

    def __init__(self, where: str) -> None:
        live = is_live_bank(where)
        folder = Path(where) if live else find_folder(where, FILENAMES, HubOptions()).path
        self._rows: _LiveRows | _FrozenRows = _LiveRows(folder) if live else _FrozenRows(folder)
        kind = self._rows.kind()
        refuse_unservable(kind)
        self.digest = settings_digest(kind.config, kind.spec)
        self._rows.expected = self.digest

    def kind(self) -> ProfileBank:
        """A bank with the settings that all profiles here share.

        Raises:
            FileFormatError: the bank is missing or damaged.
            ConfigError, MergeError, PoolMismatchError: it is not one that this server can serve.
        """
        return self._rows.kind()

    def version(self) -> int:
        """A number that changes with the bank.

        Raises:
            FileFormatError, ConfigError, MergeError, PoolMismatchError: as for :meth:`kind`.
        """
        return self._rows.version()

    def find(self, name: str) -> FoundProfile | None:
        """A profile by name; None if there is none.

        Raises:
            FileFormatError: the bank is missing or damaged, or this profile is.
            ConfigError, MergeError, PoolMismatchError: the bank is not one that this server can serve.
        """
        return self._rows.find(name)


class _FrozenRows:
    """A bank in one file, opened again when that was replaced."""

    def __init__(self, folder: Path) -> None:
        self.expected: str | None = None  # the settings' digest, once they are known
        self._folder, self._lock = folder, threading.Lock()
        self._stamp = self._stamp_now()
        self._bank: ProfileBank | None = ProfileBank.from_pretrained(folder)
        self._version = 1

    def kind(self) -> ProfileBank:
        return self._current()[0]

    def version(self) -> int:
        return self._current()[1]

    def find(self, name: str) -> FoundProfile | None:
        bank, version = self._current()
        if name not in bank:
            return None
        return FoundProfile(path_of(bank[name], settings_digest(bank.config, bank.spec)), version)

    def _current(self) -> tuple[ProfileBank, int]:
        with self._lock:
            stamp = self._stamp_now()
            if stamp != self._stamp or self._bank is None:
                self._bank = None  # until the new one has been opened: a damaged bank is not served
                opened = self._opened()
                self._stamp, self._bank, self._version = stamp, opened, self._version + 1
            return self._bank, self._version

    def _opened(self) -> ProfileBank:
        try:
            bank = ProfileBank.from_pretrained(self._folder)
        except OSError as error:
            raise FileFormatError(f"The bank in '{self._folder}' cannot be read: {error}") from error
        refuse_unservable(bank)
        digest = settings_digest(bank.config, bank.spec)
        if digest != self.expected:
            raise PoolMismatchError(
                f"The bank in '{self._folder}' was replaced by one with other settings: expected {self.expected}, "
                f"found {digest}. Restart the server to serve a bank of another pool or base.",
                expected=self.expected,
                found=digest,
            )
        return bank

    def _stamp_now(self) -> Stamp:
        """A value that changes when a file of the bank is written or replaced. Takes a few microseconds."""
        try:
            with os.scandir(self._folder) as entries:
                found = [(entry.name, entry.stat()) for entry in entries if not entry.name.startswith(".")]
        except OSError:
            return ()
        return tuple(sorted((name, each.st_ino, each.st_size, each.st_mtime_ns) for name, each in found))


class _LiveRows:
    """A live bank, which reports its own changes."""

    def __init__(self, folder: Path) -> None:
        self.expected: str | None = None  # the settings' digest, once they are known
        self._live = LiveBank.open(folder)

    def kind(self) -> ProfileBank:
        return self._live.kind

    def version(self) -> int:
        return self._live.version

    def find(self, name: str) -> FoundProfile | None:
        version = self._live.version  # before the profile: a change in between is found at the next look
        profile = self._live.get(name)
        if profile is None:
            return None
        return FoundProfile(path_of(profile, settings_digest(self._live.kind.config, self._live.kind.spec)), version)


def refuse_unservable(bank: ProfileBank) -> None:
    """Reject a bank that vLLM cannot serve, judging from its own files.

    Raises:
        MergeError: profiles that are not linear or have offsets.
        ConfigError: the bank has its own head.
    """
    refuse_nonlinear(bank)
    if bank.shared:
        raise ConfigError(
            f"This bank has modules that are saved whole ({', '.join(sorted(bank.shared))}), which vLLM cannot load "
            "with an adapter. Serve it with ProfileBank.attach (`peft-xmask serve`)."
        )
