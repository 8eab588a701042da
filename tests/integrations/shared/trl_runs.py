"""What the tests of trl's trainers share: configs, data, and short runs."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_xmask import BottleneckConfig, MagnitudeMaskConfig, WeightAdapterConfig, XPEFTConfig

CONFIGS = {
    "hard": XPEFTConfig(task_type="CAUSAL_LM", num_adapters=20, bottleneck_size=4),
    "soft": XPEFTConfig(task_type="CAUSAL_LM", num_adapters=20, bottleneck_size=4, mask_type="soft"),
    "noisy": XPEFTConfig(task_type="CAUSAL_LM", num_adapters=20, bottleneck_size=4, gumbel_noise=1.0),
    "bottleneck": BottleneckConfig(task_type="CAUSAL_LM", bottleneck_size=4, init_weights=False, dropout=0.5),
    "masked": MagnitudeMaskConfig(task_type="CAUSAL_LM", density=0.05),
    "over weights": WeightAdapterConfig(task_type="CAUSAL_LM", target="weight", r=4),
}
WORDS_OF_PROMPT = 4


def trained(model: nn.Module, adapter: str = "default") -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if f".{adapter}." in name}


def pairs(texts: list[str]) -> list[dict[str, str]]:
    """What was asked is preferred to the same words backwards."""
    split = [(text.split()[:WORDS_OF_PROMPT], text.split()[WORDS_OF_PROMPT:]) for text in texts]
    return [
        {"prompt": " ".join(head), "chosen": " " + " ".join(tail), "rejected": " " + " ".join(reversed(tail))}
        for head, tail in split
    ]


def rows(entries: list[dict[str, Any]]):
    from datasets import Dataset

    return Dataset.from_list(entries)


def arguments(folder: Path, **kwargs: Any) -> dict[str, Any]:
    common = dict(
        output_dir=str(folder), per_device_train_batch_size=8, max_steps=4, learning_rate=1e-2, logging_steps=1,
        report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False, seed=3,
    )  # fmt: skip
    return {**common, **kwargs}


def logged(trainer: Any, key: str) -> list[float]:
    return [log[key] for log in trainer.state.log_history if key in log]
