"""Writes the golden bank of version 1 beside this file: ``python make_golden.py``.

Do not write it again. It is there so that every later version opens banks of this one.
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
    here = Path(__file__).parent
    bank = golden_bank()
    with tempfile.TemporaryDirectory() as temporary:
        bank.save_pretrained(temporary)
        (here / "bank").mkdir(exist_ok=True)
        for pattern in ("*.safetensors", "adapter_config.json"):
            for path in Path(temporary).glob(pattern):
                (here / "bank" / path.name).write_bytes(path.read_bytes())
