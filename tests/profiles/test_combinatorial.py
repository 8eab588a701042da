"""Masks at the information bound."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_xmask.bank.combinatorial import coded_size, decode, encode
from peft_xmask.core.packing import pack_bits, unpack_bits
from peft_xmask.errors import MaskFormatError


def masks(profiles: int, sites: int, num_adapters: int, top_k: int, seed: int = 0) -> torch.Tensor:
    scores = torch.rand(profiles, 2, sites, num_adapters, generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(top_k).indices, True)
    return pack_bits(chosen)


def test_the_sizes_named_in_the_docs():
    assert coded_size(2 * 12, 400, 50) == 641
    assert coded_size(2 * 12, 100, 50) == 290
    assert coded_size(1, 8, 8) == 0


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_nothing_is_lost(data):
    num_adapters = data.draw(st.integers(1, 70) | st.just(400))
    top_k = data.draw(st.integers(1, num_adapters))
    sites, profiles = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 4))
    bits = masks(profiles, sites, num_adapters, top_k, data.draw(st.integers(0, 99)))
    coded = encode(bits, num_adapters, top_k)
    assert coded.shape == (profiles, coded_size(2 * sites, num_adapters, top_k))
    assert torch.equal(decode(coded, sites, num_adapters, top_k), bits)


@pytest.mark.parametrize(("num_adapters", "top_k"), [(400, 50), (400, 350), (66, 33)])
def test_more_profiles_than_are_decoded_at_once(num_adapters, top_k):
    bits = masks(700, 6, num_adapters, top_k)
    assert torch.equal(decode(encode(bits, num_adapters, top_k), 6, num_adapters, top_k), bits)


def test_every_number_is_one_mask():
    """All C(6, 2)^2 pairs of masks, by their numbers from 0: the code has no gaps."""
    seen = set()
    for number in range(15 * 15):
        bits = decode(torch.tensor([[number]], dtype=torch.uint8), 1, 6, 2)
        assert unpack_bits(bits, 6).sum(-1).eq(2).all()
        assert encode(bits, 6, 2).tolist() == [[number]]
        seen.add(tuple(bits.flatten().tolist()))
    assert len(seen) == 15 * 15


@pytest.mark.parametrize(
    "sizes",
    [
        (10**9, 100, 50),
        (1, 10**9, 10**8),
        (12, 10**9, 1),
        (10**9, 8, 8),
        (1, 8, 9),
        (1, 8, 0),
        (-3, 8, 2),
        (1, 4000, 1000),
    ],
)
def test_sizes_that_would_take_all_memory_are_refused(sizes):
    """They stand in a file that is not trusted."""
    with pytest.raises(MaskFormatError, match="can be coded"):
        decode(torch.zeros(1, 4, dtype=torch.uint8), *sizes)
    with pytest.raises(MaskFormatError, match="width"):
        decode(torch.zeros(1, 4, dtype=torch.uint8), 1000, 1000, 100)


def test_bytes_that_code_no_masks_are_refused():
    with pytest.raises(MaskFormatError, match="profile 0"):
        decode(torch.tensor([[15 * 15]], dtype=torch.uint8), 1, 6, 2)
    with pytest.raises(MaskFormatError, match="width 1"):
        decode(torch.zeros(2, 2, dtype=torch.uint8), 1, 6, 2)
