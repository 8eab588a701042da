"""The API server's table of served adapters, where most are profiles of a bank."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, ValuesView
from typing import Any
from weakref import WeakValueDictionary

from .bank_source import FoundProfile
from .lora_path import is_profile


class ServedProfiles(dict[str, Any]):
    """Takes the place of vLLM's ``dict`` from names to requests.

    It differs in three ways. Profiles that were not used for long are forgotten when there are more than ``limit``; the
    next request resolves them again. Profiles are not listed, so ``/v1/models`` neither names people nor grows with
    them; nor can a profile called "text" or "image" become vLLM's default adapter of that modality. And each profile
    is kept with the version of the bank it was read from.

    Args:
        known: what is served already, such as adapters named when the server was started.
        limit: how many profiles are remembered.
    """

    def __init__(self, known: Mapping[str, Any], limit: int) -> None:
        super().__init__(known)
        self._limit = limit
        self._used: OrderedDict[str, int] = OrderedDict()  # name -> version of the bank
        self._found: dict[str, FoundProfile] = {}  # resolved, not yet loaded

    def note(self, name: str, found: FoundProfile) -> None:
        """Remember from which version of the bank a profile comes that is about to be loaded."""
        self._found[name] = found

    def outdated(self, version: int) -> list[str]:
        """Names of profiles that come from another version of the bank."""
        return [name for name, known in self._used.items() if known != version]

    def update_profile(self, name: str, request: Any, version: int) -> None:
        """Serve another request for a profile from now on, or the same one under a new version."""
        if name in self._used:
            super().__setitem__(name, request)
            self._used[name] = version

    def __contains__(self, name: object) -> bool:
        found = super().__contains__(name)
        if found and name in self._used:
            self._used.move_to_end(name)  # type: ignore[arg-type]
        return found

    def __getitem__(self, name: str) -> Any:
        if name in self._used:
            self._used.move_to_end(name)
        return super().__getitem__(name)

    def __setitem__(self, name: str, request: Any) -> None:
        super().__setitem__(name, request)
        found = self._found.pop(name, None)
        self._used.pop(name, None)
        if is_profile(request.lora_path):
            known = found is not None and found.path == request.lora_path
            self._used[name] = found.version if known and found is not None else 0
            while len(self._used) > self._limit:
                del self[next(iter(self._used))]

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self._used.pop(name, None)

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        """Requests that are no profiles."""
        return {name: request for name, request in super().items() if name not in self._used}.values()


class LockTable(WeakValueDictionary[str, asyncio.Lock]):
    """A lock for each name, for as long as someone holds it or waits for it."""

    def __getitem__(self, name: str) -> asyncio.Lock:
        lock = self.get(name)
        if lock is None:
            lock = asyncio.Lock()
            self[name] = lock
        return lock
