"""Neighbours by Hamming distance, against a count of every bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_xmask.bank.similar import differing_bits
from peft_xmask.core.packing import unpack_bits
from peft_xmask.errors import ConfigError
from peft_xmask.profiles import Neighbour, ProfileBank


def counted(bank: ProfileBank, name: str) -> list[Neighbour]:
    """All others, by unpacking every mask."""
    wanted = bank[name].selected(bank.spec)
    found = [Neighbour(each, int((bank[each].selected(bank.spec) != wanted).sum())) for each in bank if each != name]
    return sorted(found, key=lambda neighbour: neighbour.distance)


@pytest.mark.parametrize("num_adapters", [20, 64, 100])
def test_the_nearest_are_found_in_order(many_profiles, num_adapters):
    model = many_profiles(num_profiles=40, num_adapters=num_adapters)
    bank = ProfileBank.from_model(model, [f"user-{row}" for row in range(40)])
    for name in ("user-0", "user-39"):
        expected = counted(bank, name)
        assert bank.similar(name, 7) == expected[:7]
        assert bank.similar(name, 100) == expected
    assert 0 < bank.similar("user-3", 1)[0].distance < bank.similar("user-3", 39)[-1].distance


def test_edits_count(bank):
    for twin in ("twin", "another"):
        bank.add(twin, bank["bob"])
    bank.remove("ann")
    assert bank.similar("bob", 2) == [("twin", 0), ("another", 0)]
    assert bank.similar("another", 2) == [("bob", 0), ("twin", 0)]
    assert {neighbour.name for neighbour in bank.similar("bob")} == set(bank) - {"bob"}
    assert bank.similar("Zoë") == counted(bank, "Zoë")


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 700), st.integers(1, 41), st.integers(0, 9))
def test_bits_are_counted_exactly_whatever_the_sizes(rows, width, seed):
    random = np.random.default_rng(seed)
    first, second = random.integers(0, 256, (2, rows, width), dtype=np.uint8)
    expected = np.unpackbits(first ^ second, axis=-1).sum(-1)
    assert differing_bits(first, second).tolist() == expected.tolist()
    if rows:
        assert differing_bits(first, second[0]).tolist() == np.unpackbits(first ^ second[0], axis=-1).sum(-1).tolist()


def test_more_rows_than_are_compared_at_once(many_profiles):
    """100,000 masks that differ, read from a file at an odd offset."""
    random = np.random.default_rng(0)
    stored = np.frombuffer(random.bytes(100_000 * 18 + 1), dtype=np.uint8)[1:].reshape(-1, 18)
    found = differing_bits(stored, stored[77])
    bits = unpack_bits(torch.from_numpy(stored.copy()), 144)
    assert torch.equal(torch.from_numpy(found).long(), (bits != bits[77]).sum(-1))


def test_what_cannot_be_compared_is_refused(bank, many_profiles):
    with pytest.raises(KeyError, match="nobody"):
        bank.similar("nobody")
    with pytest.raises(ConfigError, match="count"):
        bank.similar("ann", 0)
    soft = ProfileBank.from_model(many_profiles(mask_type="soft"))
    with pytest.raises(ConfigError, match="hard masks"):
        soft.similar("0")
