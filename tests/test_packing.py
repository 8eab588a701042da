import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_xmask.core.packing import check_bits, pack_bits, pack_halves, packed_size, unpack_bits, unpack_halves
from peft_xmask.errors import MaskFormatError


def k_hot(num_adapters: int, chosen: list[int]) -> torch.Tensor:
    mask = torch.zeros(num_adapters, dtype=torch.bool)
    mask[chosen] = True
    return mask


def test_the_byte_layout_is_as_documented():
    # adapters 0, 3 and 9 of 10: bits 0 and 3 of the first byte, bit 1 of the second
    assert pack_bits(k_hot(10, [0, 3, 9])).tolist() == [0b00001001, 0b00000010]


@given(st.integers(1, 70).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), min_size=1))))
def test_packing_is_lossless(case: tuple[int, set[int]]):
    num_adapters, chosen = case
    mask = k_hot(num_adapters, sorted(chosen)).expand(2, 3, num_adapters)
    bits = pack_bits(mask)
    assert bits.shape == (2, 3, packed_size(num_adapters))
    assert torch.equal(unpack_bits(bits, num_adapters), mask)
    check_bits(bits, num_adapters, len(chosen))


def test_another_number_of_ones_is_refused_with_its_place():
    bits = torch.stack([pack_bits(k_hot(10, [0, 1])), pack_bits(k_hot(10, [0, 1, 2]))])
    with pytest.raises(MaskFormatError, match=r"exactly top_k=2 of 10 .* found 3 at index \[1\]"):
        check_bits(bits, 10, 2)


def test_a_set_padding_bit_is_refused():
    bits = pack_bits(k_hot(10, [0, 1]))
    bits[1] |= 0b10000000
    with pytest.raises(MaskFormatError, match="6 bits after adapter 9"):
        check_bits(bits, 10, 3)


@pytest.mark.parametrize("bits", [torch.zeros(3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int32)])
def test_another_width_or_dtype_is_refused(bits: torch.Tensor):
    with pytest.raises(MaskFormatError, match="uint8 of width 2"):
        check_bits(bits, 10, 2)


def test_halves_survive_and_are_little_endian():
    values = torch.tensor([1.0, -0.3, 65504.0])
    data = pack_halves(values)
    assert data[:2].tolist() == [0x00, 0x3C]
    assert torch.equal(unpack_halves(data), values.half().float())
