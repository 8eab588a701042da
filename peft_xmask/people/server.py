"""A bank over HTTP: answers for each person, learning and forgetting people, metrics, and a page to explore them.

One thread runs the model, a batch at a time: requests that wait at the same time share a forward pass, and the bank
changes only between two batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from ..bank.bank import ProfileBank
from ..bank.names import check_name
from ..errors import ConfigError, FileFormatError, MissingExtraError
from .engine import Engine, OverloadedError, ServerSettings
from .live import LivePredictor

try:
    from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
    from pydantic import BaseModel, Field
except ImportError as missing:
    raise MissingExtraError(
        'Serving needs FastAPI and uvicorn, which are not installed: pip install "peft_xmask[serve]"'
    ) from missing

Name = str


class Input(BaseModel):
    """A text, and the person to answer for."""

    text: str = Field(description="The text.")
    who: Name | None = Field(None, description="A person; null: nobody.")


class PredictRequest(BaseModel):
    """Texts to answer, for any mix of people."""

    inputs: list[Input] = Field(min_length=1)


class Answer(BaseModel):
    """What the model says of a text."""

    label: str | list[str] | None
    scores: dict[str, float]
    who: Name | None
    personal: bool = Field(description="Whether a profile of this person answered, or the part that all share.")


class PredictResponse(BaseModel):
    """An answer for each text, all by one version of the bank."""

    answers: list[Answer]
    version: int


class Labelled(BaseModel):
    """A text and the label that the person gave it."""

    text: str
    label: str | float | list[str]


class LearnRequest(BaseModel):
    """Examples to learn a person from."""

    examples: list[Labelled] = Field(min_length=1)


class Learnt(BaseModel):
    """A person who was learnt. The profile is on disk."""

    who: Name
    bytes: int
    examples: int
    seconds: float


def create_app(engine: Engine) -> FastAPI:
    """The application."""
    settings = engine.settings

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        work = (engine.run(), engine.watch(), engine.share_counts())
        tasks = [asyncio.create_task(each) for each in work]
        yield
        for task in tasks:
            task.cancel()

    app = FastAPI(title="People", summary="One model, an answer for each person.", lifespan=lifespan)
    app.add_middleware(BodyLimit, limit=settings.max_body)

    def authorised(request: Request) -> None:
        if settings.api_key is None:
            return
        said = request.headers.get("x-api-key") or request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(said.encode(), settings.api_key.encode()):
            raise HTTPException(401, "Expected the API key, as 'Authorization: Bearer KEY'.")

    guarded = [Depends(authorised)]

    @app.middleware("http")
    async def count(request: Request, call_next: Callable[[Request], Any]) -> Any:
        started = time.perf_counter()
        response = await call_next(request)
        route = getattr(request.scope.get("route"), "path", "other")
        engine.counts[f'requests{{method="{request.method}",path="{route}",status="{response.status_code}"}}'] += 1
        engine.counts["request_microseconds"] += round(1e6 * (time.perf_counter() - started))
        engine.counts["requests"] += 1
        response.headers["x-worker"] = str(os.getpid())
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        """Say what is wrong without repeating the input, which may not be valid JSON text."""
        told = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        return JSONResponse({"detail": told}, 422)

    _answering(app, engine, guarded)
    _looking(app, engine, guarded)
    _watching(app, engine)
    return app


def _answering(app: FastAPI, engine: Engine, guarded: Sequence[Any]) -> None:
    """Routes that ask, learn and forget."""
    settings = engine.settings

    @app.post("/predict", dependencies=guarded)
    async def predict(request: PredictRequest) -> PredictResponse:
        """Answer texts, each for its person."""
        if len(request.inputs) > settings.max_texts:
            raise HTTPException(413, f"Expected at most {settings.max_texts} texts, found {len(request.inputs)}.")
        for asked in request.inputs:
            _check_text(asked.text, settings)
        try:
            futures = engine.submit([(asked.text, asked.who) for asked in request.inputs])
        except OverloadedError as error:
            raise HTTPException(503, str(error), {"Retry-After": "1"}) from None
        found = await asyncio.gather(*futures)
        answers = [
            Answer(
                label=list(answer.label) if isinstance(answer.label, tuple) else answer.label,
                scores=answer.scores,
                who=answer.who,
                personal=answer.personal,
            )
            for answer, _ in found
        ]
        return PredictResponse(answers=answers, version=max(version for _, version in found))

    @app.put("/people/{name}", dependencies=guarded)
    async def learn(name: Name, request: LearnRequest) -> Learnt:
        """Learn a person from labelled texts. The profile is on disk and in use when this returns."""
        live = _live(engine)
        _check_person(name)
        if len(request.examples) > settings.max_examples:
            raise HTTPException(413, f"Expected at most {settings.max_examples} examples.")
        for example in request.examples:
            _check_text(example.text, settings)
        started = time.perf_counter()
        pairs = [(example.text, example.label) for example in request.examples]
        try:
            profile = await engine.in_thread(live.learn, name, pairs)
        except (FileFormatError, ConfigError) as error:
            raise HTTPException(422, str(error)) from None
        engine.counts["learnt"] += 1
        seconds = round(time.perf_counter() - started, 3)
        return Learnt(who=name, bytes=profile.nbytes, examples=len(pairs), seconds=seconds)

    @app.delete("/people/{name}", status_code=204, dependencies=guarded)
    async def forget(name: Name) -> Response:
        """Forget a person. The profile is deleted from disk when this returns."""
        live = _live(engine)
        try:
            await asyncio.to_thread(live.forget, name)
        except KeyError:
            raise HTTPException(404, "No such person.") from None
        engine.counts["forgotten"] += 1
        return Response(status_code=204)


def _looking(app: FastAPI, engine: Engine, guarded: Sequence[Any]) -> None:
    """Routes that show the people and what is served."""

    @app.get("/people", dependencies=guarded)
    async def people(starts_with: str = "", limit: int = Query(100, ge=1, le=1000)) -> dict[str, Any]:
        """Names of people, in the order of the bank."""
        chosen = await asyncio.to_thread(
            lambda: list(islice((name for name in engine.people if name.startswith(starts_with)), limit))
        )
        return {"people": chosen, "count": len(engine.people)}

    @app.get("/people/{name}", dependencies=guarded)
    async def person(name: Name) -> dict[str, Any]:
        """The masks of a person, a row of ones and zeros (or weights) for each site."""
        from ..bank.plot import weights

        if name not in engine.people:
            raise HTTPException(404, "No such person.")
        profile, spec = engine.people[name], engine.predictor.bank.spec
        down, up = weights(spec, profile.bits.unsqueeze(0))[0].round(3).tolist()
        gains = None if profile.gains is None else [round(float(gain), 4) for gain in profile.gains]
        return {"who": name, "bytes": profile.nbytes, "down": down, "up": up, "gains": gains}

    @app.get("/map", dependencies=guarded)
    async def people_map(limit: int = Query(500, ge=3, le=2000)) -> dict[str, Any]:
        """People in two dimensions, with similar masks close to each other."""
        return dict(await asyncio.to_thread(_map, engine, limit))

    @app.get("/about")
    async def about() -> dict[str, Any]:
        """What is served."""
        head = engine.predictor.head
        return {
            "base": Path(engine.predictor.base).name,
            "labels": list(head.labels),
            "task": head.problem_type or "single_label_classification",
            "people": len(engine.people),
            "bytes_a_person": engine.predictor.bank.nbytes,
            "learns": engine.live is not None,
            "needs_key": engine.settings.api_key is not None,
        }


def _watching(app: FastAPI, engine: Engine) -> None:
    """Health, metrics and the page."""

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether the server answers, and what it serves."""
        version = engine.version if engine.live is None else engine.live.live.version
        return {"status": "ok", "people": len(engine.people), "version": version, "waiting": engine.waiting.qsize()}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        """Counters for Prometheus."""
        return "\n".join(_metrics(engine)) + "\n"

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> str:
        return resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")


class BodyLimit:
    """ASGI middleware that refuses bodies above a size, whether or not their length is announced."""

    def __init__(self, app: Any, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > self.limit:
            await self._refuse(send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > self.limit:
                await self._refuse(send)
                return
        given = False

        async def replay() -> Any:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    async def _refuse(self, send: Any) -> None:
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        told = f'{{"detail": "Expected a body of at most {self.limit} bytes."}}'.encode()
        await send({"type": "http.response.body", "body": told})


def _live(engine: Engine) -> LivePredictor:
    if engine.live is None:
        raise HTTPException(
            409, "This bank is served as it is. Start the server with --live FOLDER to learn and forget people."
        )
    return engine.live


def _check_person(name: str) -> None:
    try:
        check_name(name)
    except ConfigError as error:
        raise HTTPException(422, str(error)) from None


def _check_text(text: str, settings: ServerSettings) -> None:
    if len(text) > settings.max_characters:
        raise HTTPException(413, f"Expected a text of at most {settings.max_characters} characters.")


def _map(engine: Engine, limit: int) -> dict[str, Any]:
    from ..bank.plot import coordinates

    bank = engine.people
    if not isinstance(bank, ProfileBank):
        bank = bank.select(islice(bank, limit))
    if len(bank) < 3:
        return {"points": [], "explained": [0.0, 0.0]}
    names, points, explained = coordinates(bank, limit)
    found = [
        {"who": name, "x": round(float(x), 4), "y": round(float(y), 4)}
        for name, (x, y) in zip(names, points, strict=True)
    ]
    return {"points": found, "explained": [round(float(share), 4) for share in explained]}


def _metrics(engine: Engine) -> Iterator[str]:
    counts = engine.totals
    yield "# TYPE peft_xmask_requests_total counter"
    for name, value in sorted(counts.items()):
        if name.startswith("requests{"):
            yield f"peft_xmask_requests_total{name.removeprefix('requests')} {value}"
    yield "# TYPE peft_xmask_request_seconds summary"
    yield f"peft_xmask_request_seconds_sum {counts['request_microseconds'] / 1e6:.6f}"
    yield f"peft_xmask_request_seconds_count {counts['requests']}"
    yield "# TYPE peft_xmask_model_seconds summary"
    yield f"peft_xmask_model_seconds_sum {counts['model_microseconds'] / 1e6:.6f}"
    yield f"peft_xmask_model_seconds_count {counts['batches']}"
    for name in ("texts", "people_in_batches", "refused", "learnt", "forgotten"):
        yield f"# TYPE peft_xmask_{name}_total counter"
        yield f"peft_xmask_{name}_total {counts[name]}"
    for name, value in (("people", len(engine.people)), ("waiting", engine.waiting.qsize())):
        yield f"# TYPE peft_xmask_{name} gauge"
        yield f"peft_xmask_{name} {value}"
