"""``peft-xmask serve``: a bank over HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .console import output


def serve(
    bank: Annotated[Path, typer.Option(help="Folder of a bank, frozen or live.")],
    live: Annotated[Path | None, typer.Option(help="Learn and forget people in a live bank made of --bank.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model. Default: the one the bank names.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    workers: Annotated[int, typer.Option(help="Processes, each with a model of its own.", min=1)] = 1,
    api_key: Annotated[str | None, typer.Option(help="Key of all requests.", envvar="PEFT_XMASK_API_KEY")] = None,
    max_batch: Annotated[int, typer.Option(help="Texts in one forward pass.", min=1)] = 32,
    max_waiting: Annotated[int, typer.Option(help="Texts that may wait; more are refused (503).", min=1)] = 1024,
    max_body: Annotated[int, typer.Option(help="Bytes of a request's body.", min=1)] = 2**20,
    threads: Annotated[int | None, typer.Option(help="CPU threads of each model. Default: PyTorch's.", min=1)] = None,
) -> None:
    """Serve a bank: a page at /, answers at /predict, people at /people/NAME, OpenAPI at /docs."""
    from ..people.engine import ServerSettings
    from ..people.open import make_live
    from ..people.server import create_app
    from ..people.workers import Serving, environment

    import uvicorn  # isort: skip  (after the server, whose import says what to install)

    settings = ServerSettings(api_key=api_key or None, max_batch=max_batch, max_waiting=max_waiting, max_body=max_body)
    make_live(bank, live)
    serving = Serving(str(bank), settings, None if live is None else str(live), base, threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if host not in ("127.0.0.1", "localhost", "::1") and api_key is None:
        output.print("Anyone who reaches this address may ask, and change people with --live: set --api-key.")
    if workers > 1:
        output.print(f"Serving with {workers} workers on http://{host}:{port}")
        with environment(serving):
            uvicorn.run(
                "peft_xmask.people.workers:app", factory=True, workers=workers, host=host, port=port, access_log=False,
                log_level="warning",
            )  # fmt: skip
        return
    engine = serving.engine()
    output.print(f"Serving {len(engine.people):,} people on http://{host}:{port}")
    uvicorn.run(create_app(engine), host=host, port=port, access_log=False, log_level="warning")
