"""Folder mode: profiles as LoRA folders, named by their content, for versions of vLLM that were not tested."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import threading
from pathlib import Path

from ...bank.bake import LoraBaker
from .bank_source import BankSource, FoundProfile
from .lora_path import profile_at
from .settings import ServingSettings


class FolderStore:
    """Writes a profile's LoRA folder on first use.

    A folder is never deleted: vLLM reads it again when an adapter comes back after it was evicted, and an engine that
    finds it gone ends. Its name is a digest of what is in it, so a profile that changed has another folder.

    Args:
        source: the bank.
        settings: where to write, and the base.
    """

    def __init__(self, source: BankSource, settings: ServingSettings) -> None:
        self._source, self._settings = source, settings
        self._baker: LoraBaker | None = None
        self._lock = threading.Lock()

    def find(self, name: str) -> FoundProfile | None:
        """The folder of a profile; None if there is no such profile.

        Raises:
            PeftXMaskError: the bank, its pool or its base cannot be used.
            OSError: the folder cannot be written.
        """
        found = self._source.find(name)
        if found is None:
            return None
        folder = self._settings.folder / hashlib.sha256(found.path.encode()).hexdigest()[:32]
        if not folder.is_dir():
            self._write(found.path, folder)
        return FoundProfile(str(folder), found.version)

    def _write(self, path: str, folder: Path) -> None:
        with self._lock:
            if self._baker is None:
                self._baker = LoraBaker(self._source.kind(), self._settings.base, check_base=self._settings.check_base)
            baker = self._baker
        lora = baker.bake(profile_at(path, baker.spec, self._source.digest))
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".writing-"))
        try:
            lora.save_pretrained(beside)
            beside.rename(folder)
        except OSError:
            shutil.rmtree(beside, ignore_errors=True)
            if not folder.is_dir():  # else another thread or server was first
                raise
