"""Writes a golden bank beside this file: ``python make_golden.py`` wrote ``bank`` (version 1) and ``bank-2``.

Never write an old one again: they are there so that every later version opens them.
"""

import tempfile
from pathlib import Path

import torch

from peft_xmask import ProfileBank, XPEFTConfig

NAMES = ["bob", "ann", "Zoë"]
BITS = [[[0b010010], [0b000011]], [[0b100001], [0b110000]], [[0b000101], [0b001100]]]
"""``[profile][down, up][byte]``: two of six adapters at one site."""

GAINS = [0.5, 1.0, -2.0]


def golden_bank() -> ProfileBank:
    config = XPEFTConfig(num_adapters=6, bottleneck_size=2, top_k=2, target_modules=["dense"], num_profiles=3)
    config.pool_fingerprint = config.resolve_pool().fingerprint
    config.base_fingerprint = "0123456789abcdef"
    bits = torch.tensor(BITS, dtype=torch.uint8).unsqueeze(2)
    gains = torch.tensor(GAINS, dtype=torch.float16).view(3, 1).view(torch.uint8).view(3, 1, 2)
    return ProfileBank(config, bits, gains, NAMES, {"base_model.model.classifier.weight": torch.tensor([[1.0, -1.0]])})


if __name__ == "__main__":
    here = Path(__file__).parent / "bank-2"
    here.mkdir()
    with tempfile.TemporaryDirectory() as temporary:
        golden_bank().save_pretrained(temporary)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (here / name).write_bytes((Path(temporary) / name).read_bytes())
