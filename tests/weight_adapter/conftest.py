"""Models with a weight adapter."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_xmask import WeightAdapterConfig

sys.path.insert(0, str(Path(__file__).parent))  # the helpers, which tests import by name


@pytest.fixture
def biased_bert(tiny_bert) -> Callable[..., torch.nn.Module]:
    """Builds the tiny BERT with biases that are not zero, as those of a trained model."""

    def build(seed: int = 0, **kwargs) -> torch.nn.Module:
        base = tiny_bert(seed, **kwargs)
        generator = torch.Generator().manual_seed(seed + 100)
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                if name.endswith(".bias"):
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        return base

    return build


@pytest.fixture
def adapted(biased_bert) -> Callable[..., PeftModel]:
    """Builds that BERT with one adapter whose change is not zero."""

    def build(dtype=torch.float32, base=None, adapter_name="default", **fields) -> PeftModel:
        base = biased_bert().to(dtype) if base is None else base
        torch.manual_seed(1)
        config = WeightAdapterConfig(**{"task_type": "SEQ_CLS", "r": 4, "init_weights": False, **fields})
        return get_peft_model(base, config, adapter_name=adapter_name).eval()

    return build
