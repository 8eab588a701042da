"""docs/examples/serve.py in a process of its own, under load from another one, on loopback."""

import http.client
import json
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoTokenizer

from peft_xmask import ProfileBank, XPEFTConfig

for needed in ("fastapi", "uvicorn"):
    pytest.importorskip(needed, reason=f"the serving example needs {needed}")

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["Open the file for reading.", "Sort a list.", "How cold is it in Lisbon in November?", "A short one."]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(port: int, method: str, path: str, body: object = None) -> tuple[int, object]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, None if body is None else json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


@contextmanager
def server(base: Path, bank: Path, *options: object):
    """The example, until it answers; yields its port."""
    port = free_port()
    command = [sys.executable, str(ROOT / "docs" / "examples" / "serve.py"), "--base", str(base), "--bank", str(bank)]
    with subprocess.Popen(
        [*command, "--port", str(port), "--watch", "0.1", *map(str, options)], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while True:
                try:
                    ask(port, "GET", "/health")
                    break
                except OSError:
                    assert process.poll() is None, process.stderr.read()
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
            yield port
        finally:
            process.terminate()


def load(port: int, clients: int, seconds: float, profiles: list[str]) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("load.py")), str(port), str(clients), str(seconds)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdin.write(json.dumps({"profiles": profiles, "texts": TEXTS}) + "\n")
    process.stdin.flush()
    return process


def wait_for(port: int, known) -> dict:
    """Health of the server, as soon as it is as wanted."""
    deadline = time.monotonic() + 60
    while not known(health := ask(port, "GET", "/health")[1]):
        assert time.monotonic() < deadline, health
        time.sleep(0.05)
    return health


def many(minilm_classifier, count: int, seed: int) -> ProfileBank:
    """Profiles that differ, with the head of the classifier."""
    config = XPEFTConfig(task_type="SEQ_CLS", num_adapters=20, bottleneck_size=8, num_profiles=count, scale=1.0)
    torch.manual_seed(0)
    model = get_peft_model(minilm_classifier(), config)
    with torch.no_grad():
        weight = model.masks("default").logits.weight
        weight.normal_(std=0.01, generator=torch.Generator().manual_seed(seed))
    return ProfileBank.from_model(model, [f"user-{number}" for number in range(count)])


def expected_scores(bank: ProfileBank, minilm_classifier, minilm: Path) -> dict[tuple[str, str], list[float]]:
    model, tokenizer = bank.attach(minilm_classifier()), AutoTokenizer.from_pretrained(minilm)
    found = {}
    for name in bank:
        model.set_profile(name)
        with torch.no_grad():
            scores = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.softmax(-1).tolist()
        found |= {(name, text): row for text, row in zip(TEXTS, scores, strict=True)}
    return found


def test_users_share_batches_and_a_new_version_loses_no_request(minilm_classifier, minilm, tmp_path):
    first, second = many(minilm_classifier, 12, seed=1), many(minilm_classifier, 13, seed=2)
    expected = {
        version: expected_scores(bank, minilm_classifier, minilm) for version, bank in ((1, first), (2, second))
    }
    folder = tmp_path / "bank"
    first.save_pretrained(folder)
    with server(minilm, folder) as port:
        users = [f"user-{number}" for number in range(12)]
        clients = load(port, 8, 120, [*users, "nobody"])
        wait_for(port, lambda health: health["forwards"] > 20)
        second.save_pretrained(folder)
        so_far = wait_for(port, lambda health: health["version"] == 2)["forwards"]
        wait_for(port, lambda health: health["forwards"] > so_far + 20)
        clients.stdin.close()
        answers = [json.loads(line) for line in clients.stdout]
        assert clients.wait() == 0
        health = ask(port, "GET", "/health")[1]
        assert ask(port, "POST", "/classify", {"profile": "user-12", "text": TEXTS[0]})[0] == 200
        (tmp_path / "torn").write_bytes(b"torn")
        (tmp_path / "torn").replace(folder / "adapter_model.safetensors")
        time.sleep(1)
        for body, status in (
            ({"profile": "user-12", "text": TEXTS[0]}, 200),  # the torn version is refused, the old one stays
            ({"profile": "", "text": "x"}, 422),
            ({"profile": "x" * 2000, "text": "x"}, 422),
            ({"profile": "\ud800", "text": "x"}, 422),
            ({"text": "x"}, 422),
        ):
            assert ask(port, "POST", "/classify", body)[0] == status, body
    assert {status for profile, _, status, *_ in answers if profile != "nobody"} == {200}
    assert {status for profile, _, status, *_ in answers if profile == "nobody"} == {404}
    served = [(profile, text, answer) for profile, text, status, _, answer in answers if status == 200]
    assert {answer["version"] for *_, answer in served} == {1, 2}
    for profile, text, answer in served:
        assert answer["scores"] == pytest.approx(expected[answer["version"]][profile, text], abs=1e-5)
    assert (health["profiles"], health["version"], health["waiting"]) == (13, 2, 0)
    assert health["most_users_in_a_batch"] > 2
    assert health["forwards"] < len(served) / 2


def test_too_many_waiting_requests_are_refused(minilm_classifier, minilm, tmp_path):
    many(minilm_classifier, 3, seed=1).save_pretrained(tmp_path / "bank")
    with server(minilm, tmp_path / "bank", "--max-waiting", 1, "--max-batch", 1) as port:
        clients = load(port, 8, 1, ["user-1"])
        statuses = {json.loads(line)[2] for line in clients.stdout}
        assert clients.wait() == 0
    assert statuses == {200, 503}
