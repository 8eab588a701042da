"""vLLM's API server as a process of its own, and questions to it."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BASE_NAME = "base"
START_SECONDS = 900  # guards against hanging only


@dataclass(frozen=True)
class Api:
    """A server that answers.

    Attributes:
        port: on this machine.
        log: the file of its output.
        started_in: seconds from the start of the process to its first answer.
    """

    port: int
    log: Path
    started_in: float

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and JSON (or text) of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        headers = {"Content-Type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        data = response.read().decode()
        connection.close()
        try:
            return response.status, json.loads(data)
        except ValueError:
            return response.status, data

    def write(self, name: str | None, prompt: Sequence[int], tokens: int) -> tuple[int, Any]:
        """A greedy continuation as tokens, or the error's body; None is the base."""
        status, answer = self.ask(
            "POST",
            "/v1/completions",
            {
                "model": name or BASE_NAME, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0,
                "ignore_eos": True, "return_token_ids": True,
            },
        )  # fmt: skip
        return status, answer["choices"][0]["token_ids"] if status == 200 else answer

    def write_all(
        self, wanted: Sequence[tuple[str | None, Sequence[int]]], tokens: int, clients: int
    ) -> list[tuple[int, Any]]:
        """Answers to many requests, of which ``clients`` are under way at any time."""
        with ThreadPoolExecutor(clients) as pool:
            return list(pool.map(lambda one: self.write(*one, tokens), wanted))


@contextmanager
def api_server(base: Path, bank: Path, log: Path, *flags: object, **environment: str) -> Iterator[Api]:
    """Start a server of a bank, and stop it at the end.

    Args:
        base: folder of the model.
        bank: folder of the bank.
        log: file for its output.
        flags: more flags of the server.
        environment: more variables.

    Raises:
        RuntimeError: it ended before it answered; with the end of its output.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base),
        "--served-model-name", BASE_NAME, "--port", str(port), "--host", "127.0.0.1", "--enable-lora",
        "--max-model-len", "128", "--dtype", "float32", *map(str, flags),
    ]  # fmt: skip
    variables = {
        **os.environ, "PEFT_XMASK_VLLM_BANK": str(bank), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", **environment,
    }  # fmt: skip
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=variables)
        try:
            while True:
                if process.poll() is not None or time.monotonic() - start > START_SECONDS:
                    raise RuntimeError(f"The server did not start:\n{log.read_text()[-6000:]}")
                try:
                    if Api(port, log, 0).ask("GET", "/health")[0] == 200:
                        break
                except OSError:
                    time.sleep(0.2)
            yield Api(port, log, time.monotonic() - start)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
