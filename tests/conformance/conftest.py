"""The matrix: every method over every architecture, as fixtures."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

sys.path.insert(0, str(Path(__file__).parent))  # the two tables, which tests import by name

from architectures import ARCHITECTURES
from methods import METHODS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test the rows of the two tables that it asks for by the names of its arguments."""
    methods = {
        "method": METHODS,
        "linear_method": [each for each in METHODS if each.linear],
        "bent_method": [each for each in METHODS if not each.linear],
    }
    architectures = {
        "architecture": ARCHITECTURES,
        "generator": [each for each in ARCHITECTURES if each.generates],
        "transformer": [each for each in ARCHITECTURES if each.from_transformers],
    }
    for name, rows in {**methods, **architectures}.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, rows, ids=[row.name for row in rows])


@pytest.fixture
def adapted() -> Callable[..., PeftModel]:
    """Builds a base model with one adapter of a method, the same one each time."""

    def build(architecture, method, adapter_name: str = "default", base=None, **fields) -> PeftModel:
        base = architecture.build() if base is None else base
        torch.manual_seed(1)
        return get_peft_model(base, method.config(**architecture.fields, **fields), adapter_name=adapter_name).eval()

    return build


@pytest.fixture
def add() -> Callable[..., None]:
    """Adds one more adapter of the same method to a model."""

    def build(model: PeftModel, architecture, method, adapter_name: str, seed: int = 2, **fields) -> None:
        torch.manual_seed(seed)
        model.add_adapter(adapter_name, method.config(**{**architecture.fields, **fields}))

    return build
