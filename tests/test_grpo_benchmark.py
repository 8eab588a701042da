"""The rewards and prompts of the GRPO benchmark."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent / "benchmarks"


@pytest.fixture
def rewards(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import grpo_rewards

    yield grpo_rewards
    sys.modules.pop("grpo_rewards")


def test_only_different_listed_words_are_rewarded(rewards):
    assert rewards.five_with_s("She saw the sun. Sun, sun!") == 3 / 5
    assert rewards.five_with_s("sss ssa skkk") == 0.0
    assert rewards.five_with_s("she said so, some sad small sea") == 1.0


def test_only_a_finished_first_sentence_of_seven_words_is_rewarded(rewards):
    assert rewards.seven_words("dog who liked to play in rain. He was") == 1.0
    assert rewards.seven_words("dog who liked to play in rain and") == 0.0
    assert rewards.seven_words("dog. It liked to play in the rain.") == 0.0


def test_no_prompt_is_in_two_parts(rewards):
    parts = {part: set(rewards.prompts(part)) for part in rewards.OPENINGS}
    assert all(len(found) >= 16 for found in parts.values())
    assert len(set.union(*parts.values())) == sum(map(len, parts.values()))
