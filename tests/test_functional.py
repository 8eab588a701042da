import math

import pytest
import torch

from peft_xmask.core.adapter import AdapterPair, adapt
from peft_xmask.core.masks import (
    gain_weight,
    hard_mask,
    hard_weights,
    mix,
    pick_rows,
    scaled_gain,
    select_top_k,
    soft_mask,
)


def test_a_hard_mask_has_k_equal_weights_that_keep_the_variance():
    mask = hard_mask(torch.tensor([0.1, 0.5, -1.0, 0.4]), 2, estimator="straight_through", weighting="variance")
    assert torch.equal(mask, torch.tensor([0.0, 1.0, 0.0, 1.0]) / math.sqrt(2))
    assert torch.equal(
        hard_mask(torch.tensor([0.1, 0.5, -1.0, 0.4]), 2, estimator="straight_through", weighting="mean"),
        torch.tensor([0.0, 0.5, 0.0, 0.5]),
    )


def test_signs_add_what_is_chosen_and_subtract_the_rest_with_unit_norm():
    logits = torch.tensor([0.1, 0.5, -1.0, 0.4], requires_grad=True)
    mask = hard_mask(logits, 2, estimator="straight_through", weighting="signed")
    assert mask.tolist() == [-0.5, 0.5, -0.5, 0.5]
    (mask * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum().backward()
    assert logits.grad.tolist() == [0.5, -1.0, 0.25, 1.5]
    assert hard_weights(torch.tensor([True, False, True, True]), 3, "signed").tolist() == [0.5, -0.5, 0.5, 0.5]


def test_ties_go_to_the_lower_index():
    assert select_top_k(torch.zeros(5), 2).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("estimator", ["straight_through", "softmax", "sigmoid"])
def test_the_gradient_of_a_hard_mask_is_that_of_its_stand_in(estimator: str):
    logits = torch.tensor([0.1, 0.5, -1.0, 0.4], dtype=torch.float64, requires_grad=True)
    direction = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    (hard_mask(logits, 2, estimator=estimator, weighting="mean", temperature=0.7) * direction).sum().backward()
    stand_in = {
        "straight_through": lambda x: 0.5 * x,
        "softmax": lambda x: torch.softmax(x / 0.7, -1),
        "sigmoid": lambda x: 0.5 * torch.sigmoid((x - 0.25) / 0.7),  # half-way between 0.4 (in) and 0.1 (out)
    }[estimator]
    again = logits.detach().clone().requires_grad_()
    (stand_in(again) * direction).sum().backward()
    torch.testing.assert_close(logits.grad, again.grad)


@pytest.mark.parametrize("norm", ["variance", "mean"])
def test_the_gradient_of_a_soft_mask(norm: str):
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).half().float().requires_grad_()
    direction = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    (soft_mask(logits, weighting=norm) * direction).sum().backward()
    again = logits.detach().clone().requires_grad_()
    soft = torch.softmax(again, -1)
    (((soft / soft.norm(dim=-1, keepdim=True)) if norm == "variance" else soft) * direction).sum().backward()
    torch.testing.assert_close(logits.grad, again.grad)


def test_a_mask_can_be_differentiated_block_by_block():
    """Reentrant checkpointing runs one backward pass for each block through the one mask they share."""
    logits = torch.randn(2, 8, requires_grad=True)
    gain = torch.zeros(2, requires_grad=True)
    mask = hard_mask(pick_rows(logits, torch.tensor([1, 0])), 3, estimator="softmax", weighting="variance")
    scaled = scaled_gain(gain, 0.3, 100.0)
    for block in range(2):
        (mask[block] * scaled[block] * torch.arange(8)).sum().backward(retain_graph=False)
    assert logits.grad.abs().sum(-1).gt(0).all()
    assert gain.grad.ne(0).all()


def test_gains_are_halves_and_invert():
    weight = torch.tensor([-0.02, 0.0, 0.013])
    gain = scaled_gain(weight, 0.3, 100.0)
    assert torch.equal(gain, gain.half().float())
    again = scaled_gain(gain_weight(gain, 0.3, 100.0), 0.3, 100.0)
    assert torch.equal(again, gain)


def test_mixing_mixes_matrices_not_outputs():
    pool = torch.randn(5, 3, 4)
    mask = torch.rand(2, 5)
    expected = torch.stack([sum(mask[r, i] * pool[i] for i in range(5)) for r in range(2)])
    torch.testing.assert_close(mix(mask, pool), expected)
    torch.testing.assert_close(mix(mask[:1], pool), expected[:1])


def test_batched_pairs_equal_one_at_a_time():
    x = torch.randn(3, 6, 4)
    down, up = torch.randn(3, 2, 4), torch.randn(3, 5, 2)
    down_bias, up_bias = torch.randn(3, 2), torch.randn(3, 5)
    kwargs = dict(activation="gelu", layer_norm=True)
    together = adapt(x, AdapterPair(down, up, down_bias, up_bias), **kwargs)
    alone = [adapt(x[i], AdapterPair(down[i], up[i], down_bias[i], up_bias[i]), **kwargs) for i in range(3)]
    torch.testing.assert_close(together, torch.stack(alone))


def test_adapt_by_hand():
    pair = AdapterPair(
        torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0], [3.0]]), torch.tensor([0.5]), torch.tensor([0.0, 1.0])
    )
    out = adapt(torch.tensor([[3.0, 1.0], [0.0, 4.0]]), pair, activation="relu", layer_norm=False)
    assert out.tolist() == [[5.0, 8.5], [0.0, 1.0]]
