"""Models with a magnitude mask."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_xmask import MagnitudeMaskConfig

sys.path.insert(0, str(Path(__file__).parent))  # the helpers, which tests import by name


@pytest.fixture
def masked(tiny_bert) -> Callable[..., PeftModel]:
    """Builds the tiny BERT with one masked adapter whose values are not zero."""

    def build(dtype=torch.float32, base=None, adapter_name="default", **fields) -> PeftModel:
        base = tiny_bert().to(dtype) if base is None else base
        torch.manual_seed(1)
        config = MagnitudeMaskConfig(**{"task_type": "SEQ_CLS", "density": 0.1, "init_weights": False, **fields})
        return get_peft_model(base, config, adapter_name=adapter_name).eval()

    return build
