"""A bank of every version of the format: golden/make_golden.py wrote them, every later version opens them."""

from pathlib import Path

import torch

from peft_xmask.profiles import ProfileBank, verify_bank

GOLDEN = Path(__file__).with_name("golden")
HEAD = "base_model.model.classifier.weight"
CHOSEN = {"bob": ([1, 4], [0, 1], 0.5), "ann": ([0, 5], [4, 5], 1.0), "Zoë": ([0, 2], [2, 3], -2.0)}
"""Adapters of six that the down- and the up-mask of the one site choose, and the gain."""


def test_what_was_written_is_read():
    bank = ProfileBank.from_pretrained(GOLDEN / "bank")
    found = {
        name: (*(mask.nonzero().flatten().tolist() for mask in profile.selected(bank.spec)[:, 0]), float(profile.gains))
        for name, profile in ((name, bank[name]) for name in bank)
    }
    assert found == CHOSEN
    assert list(bank) == list(CHOSEN)
    assert torch.equal(bank.shared[HEAD], torch.tensor([[1.0, -1.0]]))
    assert (bank.config.base_fingerprint, bank.config.top_k, bank.config.scale) == ("0123456789abcdef", 2, 0.3)
    assert verify_bank(GOLDEN / "bank").total == 0


def test_the_same_bytes_are_written_again(tmp_path):
    ProfileBank.from_pretrained(GOLDEN / "bank").save_pretrained(tmp_path / "bank")
    for path in (GOLDEN / "bank").glob("*.safetensors"):
        assert (tmp_path / "bank" / path.name).read_bytes() == path.read_bytes()
