"""Offsets: the most likely ones, near zero for people who said little."""

import pytest
import torch

from peft_xmask.people.offsets import choose_variance, fit_offsets


def test_a_value_is_the_mean_residual_drawn_towards_zero():
    logits, targets = torch.zeros(5, 1), torch.tensor([1.0, 1.0, 1.0, 1.0, 3.0])
    rows = torch.tensor([0, 0, 0, 0, 1])
    offsets = fit_offsets("regression", logits, targets, rows, 3, variance=0.5)
    assert offsets.tolist() == [[pytest.approx(4 / 6)], [pytest.approx(1.0)], [0.0]]


def test_an_offset_for_labels_is_where_the_gradient_of_its_objective_is_zero():
    torch.manual_seed(0)
    logits, targets = torch.randn(40, 3), torch.randint(0, 3, (40,))
    rows = torch.arange(40) % 2
    offsets = fit_offsets("classification", logits, targets, rows, 2, variance=0.7)
    for row in range(2):
        mine = rows == row
        chosen = torch.nn.functional.one_hot(targets[mine], 3).float()
        gradient = ((logits[mine] + offsets[row]).softmax(-1) - chosen).sum(0) + offsets[row] / 0.7
        assert gradient.abs().max() < 1e-3


def test_people_who_agree_stay_at_the_common_part():
    torch.manual_seed(0)
    rows, targets = torch.arange(400) % 40, torch.randn(400)
    assert choose_variance("regression", torch.zeros(400, 1), targets, rows) <= 0.03
    apart = targets + torch.where(rows % 2 == 0, 2.0, -2.0)
    assert choose_variance("regression", torch.zeros(400, 1), apart, rows) >= 1.0


@pytest.mark.parametrize("each", [4, 100])
@pytest.mark.parametrize("variance", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("task", ["classification", "multi-label"])
def test_the_variance_is_found_from_few_and_from_many_labels(task, variance, each):
    """Offsets are drawn with a variance; what is found is that one, or a neighbour of it among the candidates."""
    torch.manual_seed(0)
    offsets = variance**0.5 * torch.randn(400, 2)
    rows = torch.arange(400).repeat_interleave(each)
    logits = torch.randn(len(rows), 2)
    likely, one = logits + offsets[rows], task == "classification"
    targets = likely.softmax(1).multinomial(1)[:, 0] if one else torch.bernoulli(likely.sigmoid())
    found = choose_variance(task, logits, targets, rows)
    assert variance / 3.4 <= found <= max(0.03, 3.4 * variance)


def test_a_person_with_five_labels_is_not_carried_away():
    """The people of the bank have a hundred labels each, of which any variance makes the same; a new one has five."""
    torch.manual_seed(0)
    offsets = 0.3 * torch.randn(60, 2)
    rows = torch.arange(60).repeat_interleave(100)
    labels = offsets[rows].softmax(1).multinomial(1)[:, 0]
    variance = choose_variance("classification", torch.zeros(len(rows), 2), labels, rows)
    new = fit_offsets(
        "classification", torch.zeros(5, 2), torch.zeros(5, dtype=torch.long), torch.zeros(5).long(), 1, variance
    )
    assert new.softmax(1)[0, 0] < 0.75
