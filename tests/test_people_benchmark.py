"""The arithmetic of the benchmark on people: scores of many people at once are those of the model, one by one."""

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    """The benchmark's modules, and a tail over three random texts."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import people_data
    import people_tail

    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    start = torch.tensor([0, 4, 6, 11])
    texts = people_data.Texts(
        start, random(11, 1536).half(), random(11, 384), random(11, 384), 1 + 0.1 * random(384), random(384), 1e-12
    )
    head = people_tail.Head(random(2, 384) / 20, torch.zeros(1))
    yield people_tail, people_tail.Tail(texts, head)
    for name in [name for name in sys.modules if name.startswith("people_")]:
        sys.modules.pop(name)


def test_scores_of_many_people_are_those_of_the_layer_norm(bench):
    people_tail, tail = bench
    numbers = torch.tensor([[2, 0, -1], [1, 1, 2]])
    batch = tail.gather(numbers, "output")
    down, up = torch.randn(2, 5, 384) / 20, torch.randn(2, 384, 5) / 3
    r = torch.relu(batch["read"] @ down.transpose(1, 2))
    full, none = tail.scores(batch, r, up, (1.0, 0.0))
    for person, slot in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2)):
        text = int(numbers[person, slot])
        tokens = slice(int(tail.texts.start[text]), int(tail.texts.start[text + 1]))
        own = torch.relu(tail.output[tokens] @ down[person].T)
        expected = people_tail.direct_scores(tail, text, own, up[person])
        torch.testing.assert_close(full[person, slot], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(none[person, slot], tail.base[text], rtol=1e-4, atol=1e-4)


def test_one_pass_knows_how_scores_change_with_a_mask(bench):
    import people_methods
    import people_pass

    _, tail = bench
    made = people_pass.PassFeatures(tail, people_methods.random_pool(16, 3, 0), 0)
    batch = tail.gather(torch.tensor([[0, 1, 2]]), "output")
    r = torch.relu(batch["read"] @ made.down.T)
    up = 1e-3 * made.pool.up[5:6]
    after, before = tail.scores(batch, r, up, (1.0, -1.0))
    torch.testing.assert_close((after - before)[0] / 2e-3, made.features[:, 5], rtol=1e-2, atol=1e-3)


def test_one_pass_goes_nowhere_on_labels_that_contradict_each_other(bench):
    import people_pass

    one = torch.tensor([1.0, -1.0, 2.0, -2.0])
    agreeing, against = (torch.stack([one, sign * one]) for sign in (1, -1))
    mask, gains = people_pass.one_pass([(part, torch.ones(2)) for part in (agreeing, against)], 0, random=False)
    assert mask[0].tolist() == [-0.5, 0.5, -0.5, 0.5]
    assert gains[10][0] == pytest.approx(2 * 3 / (2 * 9 + 10))
    assert gains[10][1] == 0


def test_masks_from_zero_add_nothing_before_a_bit_flips(bench):
    import people_methods

    _, tail = bench
    pool = people_methods.random_pool(16, 3, 0)
    batch = tail.gather(torch.tensor([[0, 1], [2, 0]]), "output")
    zero, random = (people_methods.Masks(2, 0, pool, zero=zero) for zero in (True, False))
    assert zero.parts(batch)[1].abs().max() == 0
    assert random.parts(batch)[1].abs().max() > 0
    assert zero.payload == 2 * 2 + 2


def test_first_order_features_are_the_slope_of_the_score(bench):
    import people_prior

    _, tail = bench
    ways = people_prior.Directions.of(tail, 2)
    batch = tail.gather(torch.tensor([[0, 1, 2]]), "output")
    own = torch.tensor([[1.0, -2.0, 0.5, 1.0, 3.0]])
    step = 1e-3
    (moved,) = tail.scores(batch, batch["read"] @ ways.down.T + ways.bias, ways.up(own * step))
    slope = (moved[0] - tail.base) / step
    torch.testing.assert_close(slope, (ways.features + ways.centre) @ own[0], rtol=0.05, atol=0.05)


def test_a_mask_over_random_coefficients_comes_close_to_the_numbers_it_stands_for(bench):
    import people_data
    import people_prior

    _, tail = bench
    labels = people_data.Labels(torch.tensor([0, 1, 2] * 6), torch.full((18,), -1), torch.tensor([9.0, 2.0, 5.0] * 6))
    told = people_prior.Said.of("value", tail, people_prior.Directions.of(tail, 1), [labels])
    priors, variance = (1.0, 0.0), torch.full((3,), 1.0)
    nothing, numbers, masks = (
        told.minus_log_posterior(offsets, own, people_prior.layers_of(priors)[0], variance)
        for offsets, own in (
            (torch.zeros(1, 3), torch.zeros(1, 3)),
            people_prior.numbers(told, priors, variance),
            people_prior.masks(told, priors, variance, 104, 0),
        )
    )
    assert numbers <= masks + 1e-3
    assert nothing - masks > 0.9 * (nothing - numbers)
