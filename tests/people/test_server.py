"""A bank over HTTP: nobody gets another person's answer, whoever comes, goes or is learnt meanwhile."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

pytest.importorskip("fastapi", reason="serving needs fastapi")
pytest.importorskip("uvicorn", reason="serving needs uvicorn")

from peft_xmask import ProfileBank
from peft_xmask.people.engine import ServerSettings
from peft_xmask.people.open import open_predictor
from peft_xmask.people.predictor import Predictor

TEXTS = ["western number 3", "cartoon number 1", "love story number 12"]
HOLD = 240  # seconds after which a test that hangs gives up


def ask(port: int, method: str, path: str, body=None, headers=None) -> tuple[int, object]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HOLD)
    sent = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, sent, {"content-type": "application/json", **(headers or {})})
    response = connection.getresponse()
    content = response.read()
    json_like = response.getheader("content-type", "").startswith("application/json")
    connection.close()
    return response.status, json.loads(content) if json_like and content else content.decode()


def start(*options: object) -> tuple[subprocess.Popen, int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "peft_xmask.cli", "serve", "--port", str(port), "--threads", "1"]
    process = subprocess.Popen([*command, *map(str, options)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + HOLD
    while True:
        try:
            ask(port, "GET", "/health")
            return process, port
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise AssertionError(process.communicate()[1]) from None
            time.sleep(0.2)


@contextmanager
def server(*options: object):
    process, port = start(*options)
    try:
        yield port
    finally:
        process.terminate()
        try:
            process.communicate(timeout=HOLD)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def predicted(port: int, pairs, **more) -> list[dict]:
    status, found = ask(port, "POST", "/predict", {"inputs": [{"text": t, "who": w} for t, w in pairs]}, **more)
    assert status == 200, found
    return found["answers"]


def test_answers_under_load_are_never_another_persons(personalized):
    predictor = Predictor.from_pretrained(personalized[0])
    people = [None, "ann", "bob", "cid", "dora", "eve"]
    pairs = [(text, who) for text in TEXTS for who in people]
    answers = predictor.predict([text for text, _ in pairs], [who for _, who in pairs])
    expected = {pair: answer.value for pair, answer in zip(pairs, answers, strict=True)}
    wrong: list[object] = []

    def client(number: int, port: int) -> None:
        for turn in range(10):
            pair = pairs[(number * 7 + turn) % len(pairs)]
            (found,) = predicted(port, [pair])
            if found["who"] != pair[1] or abs(found["scores"]["rating"] - expected[pair]) > 1e-3:
                wrong.append((pair, found))

    with server("--bank", personalized[0]) as port:
        threads = [threading.Thread(target=client, args=(number, port)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HOLD)
        assert not wrong
        _, metrics = ask(port, "GET", "/metrics")
        numbers = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
        assert numbers["peft_xmask_texts_total"] == "160"
        assert int(numbers["peft_xmask_model_seconds_count"]) < 160  # texts shared passes
        assert numbers['peft_xmask_requests_total{method="POST",path="/predict",status="200"}'] == "160"
        assert ask(port, "PUT", "/people/eve", {"examples": [{"text": "a", "label": 1}]})[0] == 409
        assert "<title>People</title>" in ask(port, "GET", "/")[1]
        assert ask(port, "GET", "/people/ann")[1]["bytes"] == personalized[1].bank.nbytes
        assert {point["who"] for point in ask(port, "GET", "/map")[1]["points"]} == {"ann", "bob", "cid", "dora"}
        assert ask(port, "GET", "/people?starts_with=b")[1] == {"people": ["bob"], "count": 4}
        assert set(ask(port, "GET", "/openapi.json")[1]["paths"]) >= {"/predict", "/people/{name}", "/health"}


def test_people_are_learnt_and_forgotten_for_good_through_kill_9(personalized, tmp_path):
    process, port = start("--bank", personalized[0], "--live", tmp_path / "live")
    examples = [{"text": f"{kind} number {n}", "label": 9.5} for n in range(5) for kind in ("western", "cartoon")]
    try:
        status, learnt = ask(port, "PUT", "/people/eve", {"examples": examples})
        assert (status, learnt["bytes"]) == (200, personalized[1].bank.nbytes)
        assert ask(port, "DELETE", "/people/bob")[0] == 204
        assert ask(port, "DELETE", "/people/bob")[0] == 404
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    with server("--bank", tmp_path / "live") as port:
        assert ask(port, "GET", "/people")[1] == {"people": ["ann", "cid", "dora", "eve"], "count": 4}
        eve, bob, nobody, ann = predicted(port, [(TEXTS[0], who) for who in ("eve", "bob", None, "ann")])
        assert eve["scores"]["rating"] > nobody["scores"]["rating"] + 1
        assert bob["scores"]["rating"] == pytest.approx(nobody["scores"]["rating"], abs=1e-3)
        assert [each["personal"] for each in (eve, bob, nobody, ann)] == [True, False, False, True]
        frozen = Predictor.from_pretrained(personalized[0]).predict([TEXTS[0]], "ann")[0].value
        assert ann["scores"]["rating"] == pytest.approx(frozen, abs=1e-3)


def test_limits_and_the_key(personalized):
    with server("--bank", personalized[0], "--api-key", "secret", "--max-body", 2000) as port:
        good = {"inputs": [{"text": TEXTS[0], "who": "ann"}]}
        assert ask(port, "POST", "/predict", good)[0] == 401
        assert ask(port, "POST", "/predict", good, {"x-api-key": "secret!"})[0] == 401
        assert ask(port, "GET", "/people")[0] == 401
        assert ask(port, "GET", "/health")[0] == 200
        key = {"authorization": "Bearer secret"}
        assert ask(port, "POST", "/predict", good, key)[0] == 200
        assert ask(port, "POST", "/predict", {"inputs": [{"text": "a" * 3000}]}, key)[0] == 413
        assert ask(port, "POST", "/predict", b"{", key)[0] == 422
        assert ask(port, "POST", "/predict", {"inputs": []}, key)[0] == 422
        assert ask(port, "POST", "/predict", {"inputs": [{"who": "ann"}]}, key)[0] == 422


def test_a_new_version_of_the_folder_is_served(personalized, tmp_path):
    bank = ProfileBank.from_pretrained(personalized[0])
    bank.select(["ann", "bob"]).save_pretrained(tmp_path / "bank")
    with server("--bank", tmp_path / "bank") as port:
        assert not predicted(port, [(TEXTS[0], "dora")])[0]["personal"]
        bank.save_pretrained(tmp_path / "bank")
        deadline = time.monotonic() + HOLD
        while ask(port, "GET", "/health")[1]["version"] == 1:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert predicted(port, [(TEXTS[0], "dora")])[0]["personal"]
        (tmp_path / "torn").write_bytes(b"torn")
        (tmp_path / "torn").replace(tmp_path / "bank" / "adapter_model.safetensors")
        time.sleep(2)  # longer than the server takes to look
        assert ask(port, "GET", "/health")[1]["version"] == 2
        assert predicted(port, [(TEXTS[0], "dora")])[0]["personal"]


def test_a_live_bank_in_a_folder_is_opened_as_one(personalized, tmp_path):
    predictor, watched = open_predictor(personalized[0], tmp_path / "live")
    assert watched is None
    predictor.learn("eve", [(text, 1.0) for text in TEXTS])
    again, _ = open_predictor(tmp_path / "live")
    both = [each.predict([TEXTS[0]], "eve")[0].value for each in (predictor, again)]
    assert both[0] == both[1]
    assert both[0] < predictor.predict([TEXTS[0]])[0].value
    predictor.forget("eve")
    assert not again.predict([TEXTS[0]], "eve")[0].personal


def test_workers_of_one_server_know_the_same_people(personalized, tmp_path):
    """Whichever worker learnt a person, both answer as they would; counters are those of both."""
    examples = [{"text": f"{kind} number {n}", "label": 9.5} for n in range(5) for kind in ("western", "cartoon")]
    with server("--bank", personalized[0], "--live", tmp_path / "live", "--workers", 2) as port:
        assert ask(port, "PUT", "/people/eve", {"examples": examples})[0] == 200
        asked = [(TEXTS[0], "eve"), (TEXTS[0], None), (TEXTS[0], "ann")]
        seen: dict[str, object] = {}
        count, deadline = 0, time.monotonic() + HOLD
        while len(seen) < 2:
            assert time.monotonic() < deadline, seen
            worker, answers = by_worker(port, asked)
            count += len(asked)
            seen[worker] = answers
        one, other = seen.values()
        assert one == other
        assert [each["personal"] for each in one] == [True, False, True]
        assert one[0]["scores"]["rating"] > one[1]["scores"]["rating"] + 1
        while True:
            assert time.monotonic() < deadline
            numbers = dict(line.rsplit(" ", 1) for line in ask(port, "GET", "/metrics")[1].splitlines())
            if int(numbers["peft_xmask_texts_total"]) == count and numbers["peft_xmask_learnt_total"] == "1":
                break
            time.sleep(0.2)


def by_worker(port: int, pairs) -> tuple[str, list[dict]]:
    """The process that answered, and its answers. The pause lets the other process take a connection too."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HOLD)
    body = json.dumps({"inputs": [{"text": t, "who": w} for t, w in pairs]})
    connection.request("POST", "/predict", body, {"content-type": "application/json"})
    response = connection.getresponse()
    return response.getheader("x-worker"), json.loads(response.read())["answers"]


def test_two_servers_of_one_live_bank_know_the_same_people(personalized, tmp_path):
    examples = [{"text": f"{kind} number {n}", "label": 9.5} for n in range(5) for kind in ("western", "cartoon")]
    live = tmp_path / "live"
    with server("--bank", personalized[0], "--live", live) as first, server("--bank", live) as second:
        assert ask(first, "PUT", "/people/eve", {"examples": examples})[0] == 200
        asked = [(TEXTS[0], "eve"), (TEXTS[1], "eve")]
        assert predicted(second, asked) == predicted(first, asked)
        assert predicted(second, asked)[0]["personal"]
        assert ask(second, "DELETE", "/people/eve")[0] == 204
        assert not predicted(first, asked)[0]["personal"]


def test_settings_are_checked():
    from peft_xmask.errors import ConfigError

    with pytest.raises(ConfigError, match="max_batch=0 is invalid"):
        ServerSettings(max_batch=0)
    with pytest.raises(ConfigError, match="not empty"):
        ServerSettings(api_key="")
