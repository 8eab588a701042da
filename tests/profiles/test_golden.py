"""Banks and archives of version 1, byte for byte: golden/make_golden.py wrote them, every later version opens them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open

from peft_xmask.profiles import ProfileBank, verify_bank

GOLDEN = Path(__file__).with_name("golden")
HEAD = "base_model.model.classifier.weight"
CHOSEN = {"bob": ([1, 4], [0, 1], 0.5), "ann": ([0, 5], [4, 5], 1.0), "Zoë": ([0, 2], [2, 3], -2.0)}
"""Adapters of six that the down- and the up-mask of the one site choose, and the gain."""


def opened(kind: str) -> ProfileBank:
    if kind == "bank":
        return ProfileBank.from_pretrained(GOLDEN / "bank")
    return ProfileBank.from_archive(GOLDEN / "archive.safetensors")


@pytest.mark.parametrize("kind", ["bank", "archive"])
def test_what_was_written_is_read(kind):
    bank = opened(kind)
    found = {
        name: (*(mask.nonzero().flatten().tolist() for mask in profile.selected(bank.spec)[:, 0]), float(profile.gains))
        for name, profile in ((name, bank[name]) for name in bank)
    }
    assert found == CHOSEN
    assert list(bank) == list(CHOSEN)
    assert torch.equal(bank.shared[HEAD], torch.tensor([[1.0, -1.0]]))
    assert (bank.config.base_fingerprint, bank.config.top_k, bank.config.scale) == ("0123456789abcdef", 2, 0.3)
    assert verify_bank(GOLDEN / {"bank": "bank", "archive": "archive.safetensors"}[kind]).total == 0


@pytest.mark.parametrize("kind", ["bank", "archive"])
def test_the_same_bytes_are_written_again(kind, tmp_path):
    bank = opened(kind)
    bank.save_pretrained(tmp_path / "bank")
    for path in (GOLDEN / "bank").glob("*.safetensors"):
        assert (tmp_path / "bank" / path.name).read_bytes() == path.read_bytes()
    bank.save_archive(tmp_path / "archive")
    old, new = contents(GOLDEN / "archive.safetensors"), contents(tmp_path / "archive")
    assert old[0] == new[0]
    assert old[1] == new[1]


def contents(path: Path) -> tuple[dict, dict]:
    """Tensors and metadata; the config's fields may grow."""
    tensors = {name: (tensor.dtype, tensor.shape, tensor.numpy().tobytes()) for name, tensor in load_file(path).items()}
    with safe_open(str(path), framework="pt") as file:
        metadata = dict(file.metadata())
    config = json.loads(metadata.pop("config"))
    kept = ("peft_type", "mask_type", "num_adapters", "top_k", "learn_gain", "pool_fingerprint", "base_fingerprint")
    return tensors, metadata | {name: config[name] for name in kept}


def test_the_archive_is_what_the_specification_says():
    """The worked example of docs/bank-format.md."""
    tensors, metadata = contents(GOLDEN / "archive.safetensors")
    assert metadata == metadata | {
        "format": "pt", "bank_format": "peft_xmask.bank_archive", "archive_version": "1", "sites": "1",
    }  # fmt: skip
    assert tensors["coded"] == (torch.uint8, torch.Size([3, 1]), bytes([7, 220, 76]))
    assert tensors["gain_bits"] == (torch.uint8, torch.Size([3, 1, 2]), bytes([0, 0x38, 0, 0x3C, 0, 0xC0]))
    assert tensors["names"][2] == "bobannZoë".encode()
    assert tensors["ends"][2] == b"".join(end.to_bytes(8, "little") for end in (3, 6, 10))
    assert sorted(tensors) == ["coded", "ends", "gain_bits", "hashes", "names", "rows", f"shared.{HEAD}"]
