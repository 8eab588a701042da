"""Which numbers a mask chooses, and that it chooses them again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef

from peft_xmask.errors import MaskMismatchError, TargetError
from peft_xmask.tuners.magnitude_mask.mask import Candidate, Rule, make_mask, recover_mask
from peft_xmask.tuners.magnitude_mask.random import distinct


def by_sorting(numbers, count, selection):
    """The written-down rule: order by (|w|, position), stable."""
    magnitudes = torch.cat([each.float().abs().flatten() for each in numbers])
    order = magnitudes.argsort(stable=True, descending=selection == "largest")
    return order[:count].sort().values


def flat(mask, numbers):
    starts = [0, *torch.tensor([each.numel() for each in numbers]).cumsum(0).tolist()]
    return torch.cat([places.index + start for places, start in zip(mask.indices, starts, strict=False)])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    density=st.floats(0.02, 1.0),
    selection=st.sampled_from(["smallest", "largest"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    coarse=st.sampled_from([1, 8, 1000]),
)
def test_it_is_the_first_of_the_order(seed, density, selection, dtype, coarse):
    generator = torch.Generator().manual_seed(seed)
    numbers = [torch.randn(shape, generator=generator).to(dtype) for shape in ((9, 7), (40,))]
    numbers = [(each * coarse).round() / coarse for each in numbers]  # many are equal, and many are zero
    mask = make_mask([Candidate("m", each) for each in numbers], Rule(density, selection))
    expected = by_sorting(numbers, round(density * 103), selection)
    assert torch.equal(flat(mask, numbers), expected)


def test_by_hand():
    numbers = torch.tensor([[3.0, -0.0, 1.0], [-1.0, 0.5, 1.0]])
    mask = make_mask([Candidate("m", numbers)], Rule(0.5))
    assert mask.indices[0].index.tolist() == [1, 2, 4]  # of the three ones, the first
    assert make_mask([Candidate("m", numbers)], Rule(0.5, "largest")).indices[0].index.tolist() == [0, 2, 3]
    strided = numbers.t().contiguous().t()
    assert make_mask([Candidate("m", strided)], Rule(0.5)).fingerprint == mask.fingerprint


def test_one_threshold_for_each_module_or_for_the_model():
    small, large = torch.arange(1.0, 11.0), torch.arange(11.0, 21.0)
    candidates = [Candidate("a", small), Candidate("b", large)]
    assert [len(each) for each in make_mask(candidates, Rule(0.4)).indices] == [4, 4]
    assert [len(each) for each in make_mask(candidates, Rule(0.4, scope="model")).indices] == [8, 0]
    together = [Candidate("a", small), Candidate("a", large)]
    assert [len(each) for each in make_mask(together, Rule(0.4)).indices] == [8, 0]


def test_a_padding_row_takes_no_part():
    numbers = torch.ones(4, 5)
    numbers[1] = 0.0
    for selection in ("smallest", "largest", "random"):
        index = make_mask([Candidate("m", numbers, excluded=1)], Rule(0.4, selection)).indices[0].index
        assert len(index) == 6
        assert not ((index >= 5) & (index < 10)).any()


@pytest.mark.parametrize("selection", ["smallest", "random"])
@pytest.mark.parametrize("scope", ["module", "model"])
def test_numbers_that_are_made_for_it_are_held_one_parameter_at_a_time(scope, selection):
    """As those of a quantised base are: a model that fits only as it is would not fit dequantised."""
    torch.manual_seed(0)
    stored = [torch.randn(40, 30) for _ in range(6)]
    made, peak = [], 0

    def reading(numbers):
        def read():
            nonlocal peak
            copy = numbers.clone()
            made.append(StorageWeakRef(copy.untyped_storage()))
            peak = max(peak, sum(not each.expired() for each in made))
            return copy

        return read

    rule = Rule(0.1, selection, scope)
    mask = make_mask([Candidate(str(i), reading(each)) for i, each in enumerate(stored)], rule)
    whole = make_mask([Candidate(str(i), each) for i, each in enumerate(stored)], rule)
    assert (mask.fingerprint, mask.ties) == (whole.fingerprint, whole.ties)
    assert len(made) >= 6
    assert peak == 1


def test_a_density_that_leaves_nothing():
    with pytest.raises(TargetError, match=r"density=0.01 selects none of the 10 weights of 'm'"):
        make_mask([Candidate("m", torch.ones(10))], Rule(0.01))


@pytest.mark.parametrize("selection", ["smallest", "largest", "random"])
@pytest.mark.parametrize("scope", ["module", "model"])
@pytest.mark.parametrize("made_in", [torch.float32, torch.bfloat16, torch.float16])
def test_a_base_in_another_dtype_shows_the_same_mask(selection, scope, made_in):
    torch.manual_seed(0)
    stored = [torch.randn(600, 200) * 0.02, torch.randn(500) * 0.02]
    rule = Rule(0.03, selection, scope)

    def base(dtype):
        return [Candidate(str(i), each.to(dtype)) for i, each in enumerate(stored)]

    mask = make_mask(base(made_in), rule)
    facts = dict(dtype=mask.dtype, ties=mask.ties, fingerprint=mask.fingerprint)
    half = {torch.bfloat16, torch.float16}
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        if {made_in, dtype} <= half and made_in != dtype and selection != "random":
            continue  # neither is a rounding of the other
        again = recover_mask(base(dtype), rule, **facts)
        assert all(torch.equal(a.index, b.index) for a, b in zip(again.indices, mask.indices, strict=True))
    naive = make_mask(base(torch.bfloat16), rule)
    if made_in == torch.float32 and selection != "random":
        assert naive.fingerprint != mask.fingerprint  # so what is told is needed
        assert sum(map(len, mask.ties.values())) < 0.05 * 4 * sum(map(len, mask.indices))  # and is little


def test_a_half_precision_base_in_the_other_half_precision():
    """From a checkpoint in bfloat16, as most are, a cast to float16 is exact or refused."""
    torch.manual_seed(0)
    stored = (torch.randn(200, 90) * 0.02).bfloat16()
    mask = make_mask([Candidate("m", stored)], Rule(0.03))
    again = recover_mask(
        [Candidate("m", stored.half())], Rule(0.03), dtype=mask.dtype, ties=mask.ties, fingerprint=mask.fingerprint
    )
    assert torch.equal(again.indices[0].index, mask.indices[0].index)


@pytest.mark.parametrize("ties", [{}, {"bfloat16": "not base64!"}, {"bfloat16": ""}])
def test_another_base_or_lost_ties_are_refused(ties):
    torch.manual_seed(0)
    numbers = torch.randn(200, 90)
    mask = make_mask([Candidate("m", numbers)], Rule(0.03))
    with pytest.raises(
        MaskMismatchError, match="was made on weights in float32; this base is loaded in bfloat16"
    ) as info:
        recover_mask(
            [Candidate("m", numbers.bfloat16())], Rule(0.03), dtype="float32", ties=ties, fingerprint=mask.fingerprint
        )
    assert info.value.expected == mask.fingerprint
    assert info.value.found in str(info.value)
    numbers[3, 4] = 0.0
    with pytest.raises(MaskMismatchError, match="another base, or its weights were changed"):
        recover_mask(
            [Candidate("m", numbers)], Rule(0.03), dtype="float32", ties=mask.ties, fingerprint=mask.fingerprint
        )


@settings(max_examples=30, deadline=None)
@given(below=st.integers(1, 3000), share=st.floats(0.001, 1.0), seed=st.integers(0, 2**64 - 1))
def test_distinct_numbers(below, share, seed):
    count = max(1, round(share * below))
    drawn = distinct(count, below, seed=seed, stream=0)
    assert len(set(drawn.tolist())) == count
    assert drawn.tolist() == sorted(drawn.tolist())
    assert 0 <= drawn.min() <= drawn.max() < below


def test_random_numbers_never_change():
    assert distinct(8, 1000, seed=7, stream=2).tolist() == GOLDEN


GOLDEN = [26, 110, 314, 455, 479, 504, 725, 782]
