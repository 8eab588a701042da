"""Banks of tiny profiles."""

from collections.abc import Callable

import pytest
import torch
from bank_files import NAMES
from peft import PeftModel, get_peft_model

from peft_xmask import XPEFTConfig
from peft_xmask.profiles import ProfileBank


@pytest.fixture
def many_profiles(tiny_bert) -> Callable[..., PeftModel]:
    """Builds a model with five profiles that differ, and a head."""

    def build(**fields) -> PeftModel:
        settings = {"num_adapters": 20, "bottleneck_size": 4, "scale": 1.0, "num_profiles": 5, **fields}
        model = get_peft_model(tiny_bert(), XPEFTConfig(task_type="SEQ_CLS", **settings)).eval()
        with torch.no_grad():
            for weight in model.masks("default").trained_state().values():
                weight.normal_(std=0.01, generator=torch.Generator().manual_seed(1))
        return model

    return build


@pytest.fixture
def single_profile(many_profiles, tmp_path) -> Callable[..., object]:
    """Saves a model of one profile, another one for each seed, and gives its folder."""

    def build(seed: int, **fields) -> object:
        model = many_profiles(num_profiles=1, **fields)
        with torch.no_grad():
            weight = model.masks("default").logits.weight
            weight.normal_(std=0.01, generator=torch.Generator().manual_seed(seed))
        folder = tmp_path / f"profile-{seed}-{len(fields)}"
        model.save_pretrained(folder)
        return folder

    return build


@pytest.fixture
def bank(many_profiles) -> ProfileBank:
    """Five named profiles, not saved yet."""
    return ProfileBank.from_model(many_profiles(), NAMES)
