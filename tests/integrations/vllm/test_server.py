"""vLLM's OpenAI server with the plugin: over HTTP, many people at once, and a bank that is replaced or damaged."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: VLLM=yes .ci/run makes an environment with it")

from vllm_api import api_server
from vllm_stories import TOKENS, expected, make_bank, make_base, prompts_of

from peft_xmask.profiles import ProfileBank

DEADLINE = 300  # seconds; guards against hanging only


def test_a_bank_over_http(tmp_path: Path):
    base, folder = tmp_path / "base", tmp_path / "bank"
    make_base(base)
    bank = make_bank(base, folder, 10_000, form="sequential")
    prompts = prompts_of(base)
    draws = random.Random(0)
    names = [f"person-{number}" for number in draws.sample(range(10, 9_000), 100)]
    wanted = [(name, draws.choice(prompts)) for name in [*names, *[None] * 8]]
    draws.shuffle(wanted)
    stories = expected(base, bank, wanted)
    flags = ("--max-loras", 8, "--max-cpu-loras", 32, "--max-lora-rank", 8, "--lora-target-modules", "down_proj")
    with api_server(base, folder, tmp_path / "log", *flags, PEFT_XMASK_VLLM_WATCH_SECONDS="0.2") as api:
        answers = api.write_all(wanted, TOKENS, len(wanted))
        assert {status for status, _ in answers} == {200}
        assert all(story.agrees(tokens) for story, (_, tokens) in zip(stories, answers, strict=True))

        assert api.write("nobody", prompts[0], TOKENS)[0] == 404
        assert [each["id"] for each in api.ask("GET", "/v1/models")[1]["data"]] == ["base"]  # nobody's name

        # a bank that takes its place: person-0 changes, person-2 goes, the others stay
        before = {name: api.write(name, prompts[0], TOKENS) for name in ("person-0", "person-1", "person-2")}
        assert before["person-0"][1] != before["person-1"][1]
        new = ProfileBank.from_pretrained(folder)
        new.add("person-0", bank["person-1"])
        new.remove("person-2")
        new.save_pretrained(folder)
        start = time.monotonic()
        while api.write("person-2", prompts[0], 1)[0] != 404:
            assert time.monotonic() - start < DEADLINE
            time.sleep(0.1)
        assert api.write("person-0", prompts[0], TOKENS) == before["person-1"]
        assert api.write("person-1", prompts[0], TOKENS) == before["person-1"]

        # a damaged file: a 404 for names that are new, and nothing for those that are served
        file = folder / "adapter_model.safetensors"
        whole = file.read_bytes()
        file.write_bytes(whole[:200])
        assert api.write("person-9000", prompts[0], TOKENS)[0] == 404
        assert api.write("person-1", prompts[0], TOKENS) == before["person-1"]
        assert api.write(None, prompts[0], TOKENS)[0] == 200
        file.write_bytes(whole)
        story = expected(base, bank, [("person-9000", prompts[0])])[0]
        status, tokens = api.write("person-9000", prompts[0], TOKENS)
        assert status == 200
        assert story.agrees(tokens)
        assert api.ask("GET", "/health")[0] == 200
