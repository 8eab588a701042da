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
    rows = torch.arange(400) % 40
    targets = torch.randn(400)
    train, held_out = ((torch.zeros(200, 1), targets[part], rows[part]) for part in (slice(200), slice(200, 400)))
    assert choose_variance("regression", train, held_out, 40) <= 0.03
    apart = targets + torch.where(rows % 2 == 0, 2.0, -2.0)
    train, held_out = ((torch.zeros(200, 1), apart[part], rows[part]) for part in (slice(200), slice(200, 400)))
    assert choose_variance("regression", train, held_out, 40) >= 1.0
