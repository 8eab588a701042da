"""A bank of every version of the format: golden/make_golden.py wrote them, every later version opens them."""

import shutil
from pathlib import Path

import pytest
import torch
from bank_files import MODEL

from peft_xmask.bank.storage import DATA_KEY
from peft_xmask.core.tensor_file import map_tensors
from peft_xmask.profiles import ProfileBank, verify_bank

GOLDEN = Path(__file__).with_name("golden")
HEAD = "base_model.model.classifier.weight"
CHOSEN = {"bob": ([1, 4], [0, 1], 0.5), "ann": ([0, 5], [4, 5], 1.0), "Zoë": ([0, 2], [2, 3], -2.0)}
"""Adapters of six that the down- and the up-mask of the one site choose, and the gain."""


@pytest.mark.parametrize("folder", ["bank", "bank-2"])
def test_what_was_written_is_read(folder):
    bank = ProfileBank.from_pretrained(GOLDEN / folder)
    found = {
        name: (*(mask.nonzero().flatten().tolist() for mask in profile.selected(bank.spec)[:, 0]), float(profile.gains))
        for name, profile in ((name, bank[name]) for name in bank)
    }
    assert found == CHOSEN
    assert list(bank) == list(CHOSEN)
    assert torch.equal(bank.shared[HEAD], torch.tensor([[1.0, -1.0]]))
    assert (bank.config.base_fingerprint, bank.config.top_k, bank.config.scale) == ("0123456789abcdef", 2, 0.3)
    assert verify_bank(GOLDEN / folder).total == 0


@pytest.mark.parametrize("folder", ["bank", "bank-2"])
def test_saving_it_writes_the_tensors_of_version_2(folder, tmp_path):
    ProfileBank.from_pretrained(GOLDEN / folder).save_pretrained(tmp_path)
    old, new = (map_tensors(path / MODEL) for path in (GOLDEN / "bank-2", tmp_path))
    assert new.data_sha256() == old.data_sha256() == new.metadata[DATA_KEY]
    assert list(new.tensors) == list(old.tensors)


def test_a_bank_of_version_1_becomes_one_of_version_2_in_its_folder(tmp_path):
    shutil.copytree(GOLDEN / "bank", tmp_path / "bank")
    bank = ProfileBank.from_pretrained(tmp_path / "bank")
    bank.add("new", bank["ann"])
    bank.save_pretrained(tmp_path / "bank")
    assert not list((tmp_path / "bank").glob("profiles-*"))
    assert list(ProfileBank.from_pretrained(tmp_path / "bank")) == [*CHOSEN, "new"]
    assert verify_bank(tmp_path / "bank").total == 0
