"""The server's model and the thread that runs it: batches of waiting texts, and changes of the bank between batches."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bank.bank import ProfileBank
from ..core.adapter_folder import ADAPTER_FILE
from ..errors import ConfigError, PeftXMaskError
from .counts import SharedCounts
from .live import LivePredictor
from .predictor import Prediction, Predictor

log = logging.getLogger("uvicorn.error")
Asked = tuple[str, str | None]
"""A text, and the name of the person to answer for."""


class OverloadedError(PeftXMaskError):
    """Too many texts are waiting already."""


@dataclass(frozen=True)
class ServerSettings:
    """Limits and timing of a server.

    Attributes:
        api_key: key that requests must send, as ``Authorization: Bearer KEY`` or ``X-API-Key: KEY``; None: no key is
            needed. ``/``, ``/about``, ``/health`` and ``/metrics`` never need one.
        max_batch: most texts in a forward pass.
        max_wait: seconds that a batch which is not full waits for more texts.
        max_waiting: most texts that may wait; further requests are refused with status 503.
        max_texts: most texts in a request.
        max_characters: most characters in a text.
        max_examples: most examples to learn a person from.
        max_body: most bytes in the body of a request.
        watch: seconds between two checks for a new version of the bank.
        cache_bytes: memory for the mixed adapters of the people who were asked for last.

    Raises:
        ConfigError: a limit below 1.
    """

    api_key: str | None = None
    max_batch: int = 32
    max_wait: float = 0.002
    max_waiting: int = 1024
    max_texts: int = 256
    max_characters: int = 20_000
    max_examples: int = 200
    max_body: int = 2**20
    watch: float = 1.0
    cache_bytes: int = 2**28

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_waiting", "max_texts", "max_characters", "max_examples", "max_body"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} is invalid: expected at least 1.")
        if self.api_key is not None and not self.api_key:
            raise ConfigError("Expected an API key that is not empty.")


class Engine:
    """The model, its bank, and the thread that runs the model."""

    def __init__(
        self,
        predictor: Predictor,
        settings: ServerSettings,
        folder: Path | None = None,
        shared: SharedCounts | None = None,
    ) -> None:
        self.predictor, self.settings, self.folder, self.shared = predictor, settings, folder, shared
        self.version = 1
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.waiting: asyncio.Queue[tuple[Asked, asyncio.Future[tuple[Prediction, int]]]] = asyncio.Queue(
            settings.max_waiting
        )
        self.counts: Counter[str] = Counter()
        self.stamp = None if folder is None else stamp_of(folder)

    @property
    def live(self) -> LivePredictor | None:
        """The predictor, if it can learn and forget people; otherwise None."""
        return self.predictor if isinstance(self.predictor, LivePredictor) else None

    @property
    def people(self) -> Any:
        """The bank that is being served, frozen or live."""
        return self.predictor.bank if self.live is None else self.live.live

    @property
    def totals(self) -> Counter[str]:
        """Counters of all workers."""
        return self.counts if self.shared is None else self.shared.total(self.counts)

    async def share_counts(self) -> None:
        """Share this worker's counters with the others until the server stops."""
        while self.shared is not None:
            await asyncio.sleep(self.settings.watch)
            await asyncio.to_thread(self.shared.write, Counter(self.counts))

    def submit(self, asked: list[Asked]) -> list[asyncio.Future[tuple[Prediction, int]]]:
        """Queue texts.

        Raises:
            OverloadedError: too many are waiting.
        """
        if self.waiting.qsize() + len(asked) > self.settings.max_waiting:
            self.counts["refused"] += 1
            raise OverloadedError("Too many texts are waiting. Try again later.")
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[tuple[Prediction, int]]] = [loop.create_future() for _ in asked]
        for one, future in zip(asked, futures, strict=True):
            self.waiting.put_nowait((one, future))
        return futures

    async def run(self) -> None:
        """Answer waiting texts until the server stops."""
        while True:
            batch = [await self.waiting.get()]
            if 1 + self.waiting.qsize() < self.settings.max_batch:
                await asyncio.sleep(self.settings.max_wait)
            while len(batch) < self.settings.max_batch and not self.waiting.empty():
                batch.append(self.waiting.get_nowait())
            try:
                answers, version = await self.in_thread(self._answer, [asked for asked, _ in batch])
                for answer, (_, future) in zip(answers, batch, strict=True):
                    if not future.done():  # its client may have gone
                        future.set_result((answer, version))
            except Exception as error:
                log.exception("a batch of %d failed", len(batch))
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)

    async def watch(self) -> None:
        """Serve each new version of the bank soon after it is written."""
        while self.folder is not None:
            await asyncio.sleep(self.settings.watch)
            stamp = stamp_of(self.folder)
            if stamp in (None, self.stamp):
                continue
            self.stamp = stamp
            try:
                bank = await asyncio.to_thread(ProfileBank.from_pretrained, self.folder)
                await self.in_thread(self._replace, bank)
                log.info("version %d of the bank: %d people", self.version, len(bank))
            except (PeftXMaskError, OSError) as error:
                log.error("a new version of the bank was refused, the old one stays: %s", error)

    async def in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run something in the model's thread."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, function, *arguments)

    def _answer(self, asked: list[Asked]) -> tuple[list[Prediction], int]:
        started = time.perf_counter()
        answers = self.predictor.predict(
            [text for text, _ in asked], [who for _, who in asked], batch_size=self.settings.max_batch
        )
        self.counts["batches"] += 1
        self.counts["texts"] += len(asked)
        self.counts["people_in_batches"] += len({who for _, who in asked})
        self.counts["model_microseconds"] += round(1e6 * (time.perf_counter() - started))
        return answers, self.version if self.live is None else self.live.live.version

    def _replace(self, bank: ProfileBank) -> None:
        self.predictor.replace(bank)
        self.version += 1


def stamp_of(folder: Path) -> tuple[int, int, int] | None:
    """A value that changes whenever the bank in a folder is written again."""
    with contextlib.suppress(OSError):
        found = (folder / ADAPTER_FILE).stat()
        return found.st_ino, found.st_mtime_ns, found.st_size
    return None
