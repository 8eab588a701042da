"""What differs between two banks."""

import pytest
import torch

from peft_xmask.core.packing import pack_halves
from peft_xmask.errors import ConfigError
from peft_xmask.profiles import Change, Profile, ProfileBank, compare_banks


def swapped(profile: Profile, sites: int) -> Profile:
    """The same masks, but for the down-masks of some sites, which choose what they did not."""
    bits = profile.bits.clone()
    bits[0, :sites] ^= torch.tensor([255, 255, 15], dtype=torch.uint8)
    return Profile(bits, profile.gain_bits)


def test_a_bank_does_not_differ_from_itself_in_any_order(bank, tmp_path):
    bank.save_pretrained(tmp_path)
    for other in (ProfileBank.from_pretrained(tmp_path), bank.select(reversed(list(bank)))):
        found = compare_banks(bank, other)
        assert not found
        assert found.unchanged == 5


def test_what_was_edited_is_told(bank, tmp_path):
    bank.save_pretrained(tmp_path)
    edited = ProfileBank.from_pretrained(tmp_path)
    edited.remove("bob")
    edited.add("carol", bank["ann"])
    edited.add("Zoë", swapped(bank["Zoë"], 2))
    one_gain = torch.cat([bank["ann.b"].gain_bits[:2], pack_halves(torch.tensor([[7.0]]))])
    edited.add("ann.b", Profile(bank["ann.b"].bits, one_gain))
    found = compare_banks(bank, edited)
    assert found
    assert (found.added, found.removed, found.unchanged) == (("carol",), ("bob",), 2)
    assert found.changed == (Change("Zoë", 40, 0), Change("ann.b", 0, 1))
    assert (found.settings, found.same_shared) == ({}, True)
    back = compare_banks(edited, bank)
    assert (back.added, back.removed) == (("bob",), ("carol",))
    assert set(back.changed) == set(found.changed)


def test_other_pools_and_heads_are_told(bank, many_profiles):
    other = ProfileBank.from_model(many_profiles(pool_seed=9), list(bank))
    other.shared = {name: tensor + 1 for name, tensor in other.shared.items()}
    found = compare_banks(bank, other)
    assert found.unchanged == 5
    assert found.settings == {"pool_fingerprint": (bank.config.pool_fingerprint, other.config.pool_fingerprint)}
    assert not found.same_shared
    assert found


def test_empty_banks(bank):
    assert compare_banks(bank.select([]), bank).added == tuple(bank)
    assert not compare_banks(bank.select([]), bank.select([]))
    emptied = bank.select(bank)
    for name in bank:
        emptied.remove(name)
    assert compare_banks(bank, emptied).removed == tuple(bank)


@pytest.mark.parametrize("fields", [{"num_adapters": 40}, {"mask_type": "soft"}, {"learn_gain": False}])
def test_masks_of_other_sizes_are_refused(fields, bank, many_profiles):
    with pytest.raises(ConfigError, match="of one size"):
        compare_banks(bank, ProfileBank.from_model(many_profiles(**fields)))
