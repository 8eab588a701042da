"""Serve a bank of profiles over HTTP: texts of different users in one forward pass, new versions without a restart.

    pip install "peft_xmask[serve]"
    python serve.py --base sentence-transformers/all-MiniLM-L6-v2 --bank bank
    curl -H 'content-type: application/json' -d '{"profile": "alice", "text": "Open it"}' localhost:8000/classify

``--base`` is a model for sequence classification whose head the bank carries. Save another version over the bank's
folder (``bank.save_pretrained``, ``peft-xmask bank ... --replace``): it serves from the next batch on, and no request
is lost. Do not copy over its files by other means: they are mapped into memory, and have to be renamed into place.
"""

import argparse
import asyncio
import contextlib
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from peft_xmask import PeftXMaskError, ProfileBank

MASKS = "adapter_model.safetensors"
log = logging.getLogger("uvicorn.error")


class Request(BaseModel):
    profile: str = Field(min_length=1, max_length=1024)
    text: str = Field(max_length=20_000)


class Answer(BaseModel):
    label: int
    scores: list[float]
    version: int


class Classifier:
    """One model and the bank it serves. Everything here runs in one thread, so a version changes between batches."""

    def __init__(self, base: str, folder: Path, cache_bytes: int = 0, max_length: int = 128) -> None:
        self.folder, self.max_length = folder, max_length
        self.stamp = stamp_of(folder)
        self.bank = ProfileBank.from_pretrained(folder)
        classes = next((len(tensor) for key, tensor in self.bank.shared.items() if key.endswith("weight")), None)
        head = {} if classes is None else {"num_labels": classes}
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.model = self.bank.attach(AutoModelForSequenceClassification.from_pretrained(base, **head))
        self.model.cache_profiles(cache_bytes)  # of the version at hand: another one starts with nothing kept
        self.version, self.forwards, self.largest_batch, self.most_users = 1, 0, 0, 0

    def classify(self, requests: list[Request]) -> list[Answer | None]:
        """An answer for each request, None where there is no such profile."""
        known = [request for request in requests if request.profile in self.bank]
        rows = iter(self.scores(known)) if known else iter(())
        return [self.answer(next(rows)) if request.profile in self.bank else None for request in requests]

    def scores(self, requests: list[Request]) -> list[list[float]]:
        texts = [request.text for request in requests]
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        names = [request.profile for request in requests]
        with torch.inference_mode():
            logits = self.model(**batch, adapter_names=names).logits
        self.forwards += 1
        self.largest_batch = max(self.largest_batch, len(requests))
        self.most_users = max(self.most_users, len(set(names)))
        return logits.float().softmax(-1).tolist()

    def answer(self, scores: list[float]) -> Answer:
        return Answer(label=max(range(len(scores)), key=scores.__getitem__), scores=scores, version=self.version)

    def take(self, bank: ProfileBank, stamp: tuple[int, ...]) -> None:
        """Serve another version. One that does not belong to this model is refused, and the old one stays."""
        self.stamp = stamp
        bank.replace(self.model)
        self.bank, self.version = bank, self.version + 1


class Batcher:
    """Requests that wait at the same time become one batch.

    While a batch runs, the next one gathers, so batches grow with the load. A batch that is not full waits ``max_wait``
    seconds for more.
    """

    def __init__(self, classifier: Classifier, max_batch: int, max_wait: float, max_waiting: int) -> None:
        self.classifier, self.max_batch, self.max_wait = classifier, max_batch, max_wait
        self.waiting: asyncio.Queue[tuple[Request, asyncio.Future[Answer | None]]] = asyncio.Queue(max_waiting)
        self.thread = ThreadPoolExecutor(1)

    async def submit(self, request: Request) -> Answer | None:
        answer: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()
        self.waiting.put_nowait((request, answer))  # asyncio.QueueFull: the server is overloaded
        return await answer

    async def run(self) -> None:
        while True:
            batch = await self.gather()
            try:
                answers = await self.in_thread(self.classifier.classify, [request for request, _ in batch])
                for (_, future), answer in zip(batch, answers, strict=True):
                    if not future.done():  # its client may have gone
                        future.set_result(answer)
            except Exception as error:
                log.exception("a batch of %d failed", len(batch))
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)

    async def gather(self) -> list[tuple[Request, asyncio.Future[Answer | None]]]:
        batch = [await self.waiting.get()]
        if 1 + self.waiting.qsize() < self.max_batch:
            await asyncio.sleep(self.max_wait)
        while len(batch) < self.max_batch and not self.waiting.empty():
            batch.append(self.waiting.get_nowait())
        return batch

    async def watch(self, every: float) -> None:
        """Take each new version of the bank's folder, soon after it was written."""
        classifier = self.classifier
        while True:
            await asyncio.sleep(every)
            stamp = stamp_of(classifier.folder)
            if stamp in (None, classifier.stamp):
                continue
            try:
                bank = await asyncio.to_thread(ProfileBank.from_pretrained, classifier.folder)
                await self.in_thread(classifier.take, bank, stamp)
                log.info("version %d: %d profiles", classifier.version, len(bank))
            except (PeftXMaskError, OSError) as error:
                classifier.stamp = stamp
                log.error("a new version was refused, the old one stays: %s", error)

    async def in_thread(self, function, *args):
        return await asyncio.get_running_loop().run_in_executor(self.thread, function, *args)


def stamp_of(folder: Path) -> tuple[int, ...] | None:
    """What tells one version of a bank from the next."""
    with contextlib.suppress(OSError):
        found = (folder / MASKS).stat()
        return found.st_ino, found.st_mtime_ns, found.st_size
    return None


def create_app(classifier: Classifier, max_batch: int, max_wait: float, max_waiting: int, watch: float) -> FastAPI:
    batcher = Batcher(classifier, max_batch, max_wait, max_waiting)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI):
        tasks = [asyncio.create_task(batcher.run()), asyncio.create_task(batcher.watch(watch))]
        yield
        for task in tasks:
            task.cancel()

    app = FastAPI(title="Profiles", lifespan=lifespan)

    @app.exception_handler(RequestValidationError)
    async def refuse(_, error: RequestValidationError) -> JSONResponse:
        """What is wrong, without what was sent: it may hold what cannot be sent back."""
        return JSONResponse(
            {"detail": [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]}, 422
        )

    @app.post("/classify")
    async def classify(request: Request) -> Answer:
        try:
            answer = await batcher.submit(request)
        except asyncio.QueueFull:
            raise HTTPException(503, "Too many requests are waiting. Try again later.") from None
        if answer is None:
            raise HTTPException(404, f"No profile {request.profile!r} in this bank.")
        return answer

    @app.get("/health")
    async def health() -> dict[str, int]:
        return {
            "profiles": len(classifier.bank),
            "version": classifier.version,
            "waiting": batcher.waiting.qsize(),
            "forwards": classifier.forwards,
            "largest_batch": classifier.largest_batch,
            "most_users_in_a_batch": classifier.most_users,
        }

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="model for sequence classification: folder or Hub id")
    parser.add_argument("--bank", required=True, type=Path, help="folder of a bank")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-batch", type=int, default=32, help="requests in one forward pass, at most")
    parser.add_argument("--max-wait", type=float, default=0.002, help="seconds to wait for a batch to fill")
    parser.add_argument("--max-waiting", type=int, default=1024, help="requests that may wait; more are refused (503)")
    parser.add_argument("--watch", type=float, default=1.0, help="seconds between looks for a new version of the bank")
    parser.add_argument("--cache", type=int, default=256, help="megabytes for adapters of recent users; 0: none")
    options = parser.parse_args()
    classifier = Classifier(options.base, options.bank, options.cache * 2**20)
    app = create_app(classifier, options.max_batch, options.max_wait, options.max_waiting, options.watch)
    uvicorn.run(app, host=options.host, port=options.port, access_log=False)


if __name__ == "__main__":
    main()
