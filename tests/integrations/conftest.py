"""Fixtures of the tests of trl's trainers: a real small language model and real text."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def trl() -> ModuleType:
    return pytest.importorskip("trl", reason="trl is not installed: pip install peft_xmask[trl]")


@pytest.fixture(scope="module")
def llama(shared_data: Path) -> Path:
    return shared_data / "stories260k-llama"


@pytest.fixture(scope="module")
def tokenizer(llama: Path):
    return AutoTokenizer.from_pretrained(llama)


@pytest.fixture(scope="module")
def texts(shared_data: Path) -> list[str]:
    """What people ask an assistant."""
    with gzip.open(shared_data / "clinc150" / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        every = [json.loads(line)["text"] for line in lines]
    return [text for text in every[::97] if len(text.split()) > 5][:64]


@pytest.fixture
def base(llama: Path) -> Callable[[], nn.Module]:
    return lambda: AutoModelForCausalLM.from_pretrained(llama).eval()
