"""Offsets: the most likely ones, near zero for people who said little."""

import pytest
import torch

from peft_xmask.training.offset_prior import VARIANCES, likeliest_variance
from peft_xmask.training.offsets import SharedOutputs, fit_offsets

WITH_NONE = (0.0, *VARIANCES)


def test_offsets_of_values_are_the_shrunk_mean_residual():
    shared = SharedOutputs(torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([2.0, 5.0, 5.0]))
    found = fit_offsets(shared, torch.tensor([0, 0, 1]), 3, 0.5)
    torch.testing.assert_close(found, torch.tensor([[4.0 / (2 + 2)], [0.0], [0.0]]))


def labelled(kind: str, logits: torch.Tensor) -> SharedOutputs:
    if kind == "classes":
        return SharedOutputs(logits, logits.softmax(1).multinomial(1)[:, 0])
    return SharedOutputs(logits, torch.bernoulli(logits.sigmoid()))


@pytest.mark.parametrize("variance", [0.03, 0.7, 30.0])
@pytest.mark.parametrize(("kind", "width"), [("classes", 3), ("classes", 20), ("labels", 3)])
def test_offsets_are_the_minimum(kind, width, variance, monkeypatch):
    """The gradient of the penalised loss is zero there, also where a class is rare; without examples the offset is."""
    monkeypatch.setattr("peft_xmask.training.offsets._NUMBERS", 2 * width**2)  # two profiles at once
    torch.manual_seed(0)
    shared = labelled(kind, torch.randn(4000, width) + torch.tensor([0.0, -5.0, 2.0, *[0.0] * (width - 3)]))
    shared = SharedOutputs(torch.randn(4000, width), shared.labels)
    rows = torch.cat([torch.randint(0, 4, (3990,)), torch.full((10,), 5)])[torch.randperm(4000)]
    found = fit_offsets(shared, rows, 6, variance).requires_grad_()
    (gradient,) = torch.autograd.grad(
        shared.moved(found[rows]).losses().sum() + (found**2).sum() / (2 * variance), found
    )
    assert gradient.abs().max() < 5e-3
    assert not found[4].any()
    assert torch.equal(fit_offsets(shared, rows, 6, 0.0), torch.zeros(6, width))


@pytest.mark.parametrize("kind", ["classes", "labels"])
def test_a_person_who_always_says_the_same_has_a_finite_offset(kind):
    """Whose labels alone would be most likely at infinity."""
    labels = torch.zeros(300, dtype=torch.long) if kind == "classes" else torch.ones(300, 2)
    shared = SharedOutputs(torch.full((300, 2), -8.0), labels)
    found = fit_offsets(shared, torch.zeros(300, dtype=torch.long), 1, 3.0).requires_grad_()
    (gradient,) = torch.autograd.grad(shared.moved(found[[0] * 300]).losses().sum() + (found**2).sum() / 6, found)
    assert gradient.abs().max() < 1e-3
    assert 1 < found.detach().abs().max() < 20


def test_people_who_agree_stay_at_the_common_part():
    torch.manual_seed(0)
    rows, labels = torch.arange(400) % 40, torch.randn(400)
    assert likeliest_variance(SharedOutputs(torch.zeros(400, 1), labels), rows, WITH_NONE) <= 0.03
    apart = labels + torch.where(rows % 2 == 0, 2.0, -2.0)
    assert likeliest_variance(SharedOutputs(torch.zeros(400, 1), apart), rows, WITH_NONE) >= 1.0


@pytest.mark.parametrize("each", [4, 100])
@pytest.mark.parametrize("variance", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["classes", "labels"])
def test_the_variance_is_found_from_few_and_from_many_labels(kind, variance, each):
    """Offsets are drawn with a variance; what is found is that one, or a neighbour of it among the candidates."""
    torch.manual_seed(0)
    offsets = variance**0.5 * torch.randn(400, 2)
    rows = torch.arange(400).repeat_interleave(each)
    logits = torch.randn(len(rows), 2)
    shared = SharedOutputs(logits, labelled(kind, logits + offsets[rows]).labels)
    found = likeliest_variance(shared, rows, WITH_NONE)
    assert variance / 3.4 <= found <= max(0.03, 3.4 * variance)


def test_a_person_with_five_labels_is_not_carried_away():
    """The people of the bank have a hundred labels each, of which any variance makes the same; a new one has five."""
    torch.manual_seed(0)
    offsets = 0.3 * torch.randn(60, 2)
    rows = torch.arange(60).repeat_interleave(100)
    labels = offsets[rows].softmax(1).multinomial(1)[:, 0]
    variance = likeliest_variance(SharedOutputs(torch.zeros(len(rows), 2), labels), rows)
    five = SharedOutputs(torch.zeros(5, 2), torch.zeros(5, dtype=torch.long))
    assert fit_offsets(five, torch.zeros(5).long(), 1, variance).softmax(1)[0, 0] < 0.75
