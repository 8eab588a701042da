import gc
import hashlib
import math
import weakref

import pytest
import torch

from peft_xmask.core.sites import Site
from peft_xmask.errors import ConfigError, PoolMismatchError
from peft_xmask.pool import AdapterPool

SITES = [Site(f"layer.{i}", 20, 12) for i in range(3)]

GOLDEN = {"0.down": "6b0c1505db8ef11c", "0.up": "acdc1d2baf2bbafa", "1.up": "84eb58311c4c7d68"}
GOLDEN_INTEGERS = [28445, -16513, 22687, -7703]


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().astype("<f4").tobytes()).hexdigest()[:16]


def test_golden_digests():
    """These numbers are the meaning of every profile trained on a random pool: they may never change."""
    first, second = AdapterPool.random(5, 3, seed=7).bind(SITES[:2])
    found = {name: digest(tensor) for name, tensor in (("0.down", first.down), ("0.up", first.up), ("1.up", second.up))}
    assert found == GOLDEN
    assert AdapterPool.random(5, 3, seed=7).fingerprint == "fe13acf5cf0ec683"
    step = math.sqrt(12 / (2**32 - 1)) / math.sqrt(20)
    assert first.down[0, 0, :4].tolist() == pytest.approx([step * n for n in GOLDEN_INTEGERS], rel=1e-6)


def test_largest_seed_and_low_precision_are_pinned_too():
    last = AdapterPool.random(2, 3, seed=2**64 - 1, dtype=torch.bfloat16).bind(SITES[:1])[0]
    assert last.down.dtype == last.up.dtype == torch.bfloat16
    assert digest(last.down.float()) == "10bf9a7b39b3c6ba"


def test_same_bits_whatever_the_number_of_adapters():
    small = AdapterPool.random(3, 4).bind(SITES)
    large = AdapterPool.random(37, 4).bind(SITES)
    for a, b in zip(small, large, strict=True):
        assert torch.equal(a.down, b.down[:3])
        assert torch.equal(a.up, b.up[:3])


def test_same_bits_whatever_the_other_sites_and_the_order_of_generation():
    alone = AdapterPool.random(4, 5).bind(SITES[:1])[0]
    down = alone.down.clone()
    del alone
    among = AdapterPool.random(4, 5).bind([SITES[0], Site("wider", 64, 8), SITES[2]])[0]
    assert torch.equal(among.down, down)


def test_same_bits_whatever_the_threads():
    digests = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 5):
            torch.set_num_threads(count)
            slices = AdapterPool.random(33, 6, seed=3).bind(SITES)
            digests.append([(digest(part.down), digest(part.up)) for part in slices])
            del slices
            gc.collect()
    finally:
        torch.set_num_threads(threads)
    assert digests[0] == digests[1]


def test_every_matrix_is_its_own_stream():
    slices = AdapterPool.random(4, 6, seed=1).bind([Site(str(i), 6, 6) for i in range(3)])
    other = AdapterPool.random(4, 6, seed=2).bind([Site("0", 6, 6)])
    matrices = [matrix for part in (*slices, *other) for matrix in (*part.down, *part.up)]
    assert len({digest(matrix) for matrix in matrices}) == len(matrices) == 32


def test_an_adapter_and_a_unit_norm_mix_keep_the_size_of_their_input():
    part = AdapterPool.random(64, 48).bind([Site("wide", 256, 256)])[0]
    x = torch.nn.functional.normalize(torch.randn(200, 256, generator=torch.Generator().manual_seed(0))) * 16
    for weights in (torch.eye(64)[0], torch.full((64,), 1 / 8)):
        down, up = (torch.einsum("n,nij->ij", weights, tensor) for tensor in (part.down, part.up))
        assert 0.8 < (x @ down.T @ up.T).square().mean().sqrt() < 1.25
    assert part.down.std() * 16 == pytest.approx(1, rel=0.01)
    assert abs(part.down.mean()) < 1e-3


def test_low_precision_is_the_rounded_float32():
    full = AdapterPool.random(3, 4).bind(SITES)
    for dtype in (torch.bfloat16, torch.float16):
        pool = AdapterPool.random(3, 4, dtype=dtype)
        assert pool.dtype == dtype
        assert pool == AdapterPool.random(3, 4)
        for a, b in zip(pool.bind(SITES), full, strict=True):
            assert torch.equal(a.up, b.up.to(dtype))


def test_models_share_the_tensors_and_nothing_outlives_them():
    first = AdapterPool.random(3, 4, seed=11).bind(SITES)
    second = AdapterPool.random(3, 4, seed=11).bind(SITES)
    assert all(a.down is b.down and a.up is b.up for a, b in zip(first, second, strict=True))
    assert [part.origin for part in first] == [part.origin for part in second]
    assert first[0].origin != first[1].origin
    alive = weakref.ref(first[0].down)
    del first
    gc.collect()
    assert alive() is not None
    del second
    gc.collect()
    assert alive() is None


def test_bound_under_a_meta_device_or_inference_mode_it_is_still_a_usable_pool():
    with torch.device("meta"), torch.inference_mode():
        part = AdapterPool.random(2, 3, seed=5).bind(SITES)[0]
    weights = torch.ones(2, requires_grad=True)
    torch.einsum("n,nij->ij", weights, part.down).sum().backward()
    assert part.down.device.type == "cpu"
    assert weights.grad is not None


def test_what_a_random_pool_says_of_itself():
    pool = AdapterPool.random(7, 3, seed=9)
    assert (pool.kind, pool.num_adapters, pool.bottleneck_size, pool.seed, pool.nbytes) == ("random", 7, 3, 9, 0)
    assert (pool.insertion_form, pool.activation, pool.layer_norm, pool.target_modules) == (None, None, None, None)
    assert pool.mask_weighting == "signed"
    assert pool.name_or_path is None
    assert pool.fingerprint in repr(pool)
    changed = [AdapterPool.random(8, 3, 9), AdapterPool.random(7, 4, 9), AdapterPool.random(7, 3, 8)]
    assert len({pool, *changed}) == 4


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_adapters": 0},
        {"bottleneck_size": -1},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": 1.5},
        {"num_adapters": True},
    ],
)
def test_values_out_of_range_are_refused(arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        AdapterPool.random(**arguments)


def test_other_dtypes_are_refused():
    with pytest.raises(ConfigError, match=r"torch\.float64"):
        AdapterPool.random(dtype=torch.float64)


def test_a_site_without_width_is_refused():
    with pytest.raises(PoolMismatchError, match="'empty'"):
        AdapterPool.random(2, 3).bind([Site("empty", 0, 4)])
