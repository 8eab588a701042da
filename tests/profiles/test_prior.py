"""Profiles over a fitted pool: they start at the common part, and the prior says how far few examples carry them."""

import importlib.util
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_xmask import Learner, ProfileLearning, XPEFTConfig, train_profiles
from peft_xmask.core.packing import unpack_bits, unpack_halves
from peft_xmask.errors import ConfigError
from peft_xmask.integrations import XPEFTCallback
from peft_xmask.tuners.xpeft.logits import starting_logits
from peft_xmask.tuners.xpeft.spec import MaskSpec

SCRIPT = Path(__file__).parents[1] / "pool" / "fitted.py"
module_spec = importlib.util.spec_from_file_location("fitted", SCRIPT)
fitted = importlib.util.module_from_spec(module_spec)
module_spec.loader.exec_module(fitted)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return fitted.fit(tmp_path_factory.mktemp("fitted"), dataset=fitted.people()).pool


def adapted(pool, **fields) -> PeftModel:
    return get_peft_model(fitted.base(), XPEFTConfig(**{"pool": pool, "task_type": "SEQ_CLS", **fields}))


def masks_of(model):
    return model.base_model.table.adapters["default"]


def train(pool, folder, **fields):
    settings = {"config": XPEFTConfig(pool=pool, task_type="SEQ_CLS"), "args": fitted.arguments(folder), **fields}
    return train_profiles(
        fitted.base(), fitted.people(5), profile_column="task", head="frozen", progress=False, **settings
    )


def test_one_profile_starts_at_the_common_part_too(pool):
    model = adapted(pool).eval()
    batch = {"input_ids": torch.arange(1, 19).view(3, 6)}
    with torch.no_grad():
        started = model(**batch).logits
        model.set_profile(-1)
        torch.testing.assert_close(started, model(**batch).logits, atol=1e-5, rtol=1e-5)


def test_bits_change_one_after_another():
    """At equal logits the first step of Adam would set every bit."""
    spec = MaskSpec(
        num_profiles=1, num_sites=1, num_adapters=24, mask_type="hard", top_k=12, weighting="signed",
        estimator="straight_through", scale=1.0, learn_gain=True,
    )  # fmt: skip
    logits = starting_logits(spec)
    assert (logits > 0).tolist() == [True] * 12 + [False] * 12
    signs = torch.randn(24, generator=torch.Generator().manual_seed(0)).sign()
    changed = [int(((logits + 0.1 * steps * signs > 0) != (logits > 0)).sum()) for steps in (1, 4, 7, 10)]
    assert changed == sorted(changed)
    assert changed[0] <= 2 < changed[-1]


def test_shipped_bytes_come_back_as_the_same_masks(pool):
    model = adapted(pool, num_profiles=3)
    masks = masks_of(model)
    with torch.no_grad():
        masks.logits.weight.normal_(std=0.01, generator=torch.Generator().manual_seed(1))
    shipped = [each.clone() for each in masks.shipped()]
    masks.load(*shipped)
    assert all(torch.equal(again, each) for again, each in zip(masks.shipped(), shipped, strict=True))


def test_statistics_are_of_the_masks_that_serve(pool):
    masks = masks_of(adapted(pool))
    callback = XPEFTCallback()
    callback._statistics(masks)
    before = unpack_bits(masks.shipped()[0], pool.num_adapters)
    with torch.no_grad():
        masks.logits.weight.normal_(std=1e-3, generator=torch.Generator().manual_seed(1))
    after = unpack_bits(masks.shipped()[0], pool.num_adapters)
    churn = float((after & ~before).sum() / after.sum())
    assert callback._statistics(masks)["mask_churn"] == pytest.approx(churn, abs=1e-4)
    assert 0 < churn < 0.3


def test_the_prior_is_zero_at_the_common_part_and_that_of_a_group_is_half_k(pool):
    masks = masks_of(adapted(pool, num_profiles=3))
    assert masks.minus_log_prior(torch.arange(3)).abs().max() < 1e-9
    wanted = torch.randn(2, 2, pool.fitting.principal, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        far = (wanted @ pool.fitting.coefficients.T).view(-1)
        masks.logits.weight[1] = 10 * far
    rows = torch.tensor([0, 1, -1])
    found = masks.minus_log_prior(rows)
    assert found[1].item() == pytest.approx(pool.fitting.principal / 2, rel=0.4)
    assert not found[2]
    with torch.no_grad():
        masks.gain.weight.fill_(-1e6)
    assert not masks.minus_log_prior(rows).any()
    found.sum().backward()
    moved = masks.logits.weight.grad.abs().sum(1)
    assert (moved > 1e-4).tolist() == [False, True, False]


def test_other_pools_have_no_prior():
    model = get_peft_model(fitted.base(), XPEFTConfig(num_adapters=8, bottleneck_size=4, task_type="SEQ_CLS"))
    with pytest.raises(ConfigError, match="has no prior"):
        masks_of(model).minus_log_prior(torch.tensor([0]))
    for settings in (ProfileLearning, lambda **given: train(None, "unused", **given)):
        with pytest.raises(ConfigError, match="prior_strength=-1 is invalid"):
            settings(prior_strength=-1)


def deviation(bank, pool) -> torch.Tensor:
    """How far each profile is from the common part, as the prior measures it."""
    masks = masks_of(adapted(pool, num_profiles=len(bank)))
    content = bank.content()
    masks.load(content.bits, content.gain_bits)
    with torch.no_grad():
        return masks.minus_log_prior(torch.arange(len(bank)))


def test_a_strong_prior_keeps_profiles_near_the_common_part(pool, tmp_path):
    found = []
    for strength in (0.0, 1.0, 1000.0):
        bank = train(pool, tmp_path / str(strength), prior_strength=strength)
        found.append(float(deviation(bank, pool).mean()))
    assert found[0] > found[1] > found[2]
    assert found[2] < 0.1 * found[0]


def test_a_learner_goes_further_the_more_a_person_has_said(pool, tmp_path):
    bank = train(pool, tmp_path)
    learner = Learner(fitted.base(), bank, ProfileLearning(steps=12, gain_factors=(1.0,)))
    free = Learner(fitted.base(), bank, ProfileLearning(steps=12, gain_factors=(1.0,), prior_strength=0.0))
    examples = [row for row in fitted.people(7, 60) if row["task"] == "west"]
    sizes = []
    for each, count in ((learner, 4), (learner, 60), (free, 4)):
        profile = each.learn(examples[:count])
        masks = masks_of(adapted(pool))
        masks.load(profile.bits[None], profile.gain_bits[None])
        with torch.no_grad():
            sizes.append(float(masks.minus_log_prior(torch.tensor([0]))))
        assert unpack_halves(profile.gain_bits).isfinite().all()
    few, many, without = sizes
    assert few < many
    assert few < without


def test_gains_chosen_by_few_examples_do_not_undo_the_prior(pool, tmp_path):
    bank = train(pool, tmp_path)
    learner = Learner(fitted.base(), bank, ProfileLearning(gain_factors=(1.0, 8.0)))
    free = Learner(fitted.base(), bank, ProfileLearning(gain_factors=(8.0,), prior_strength=0.0))
    examples = [row for row in fitted.people(7, 60) if row["task"] == "west"]
    gains = [unpack_halves(each.learn(examples[:8]).gain_bits).max() for each in (learner, free)]
    assert gains[0] < 4 < gains[1]
