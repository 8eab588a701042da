"""learn_profile: one person from a few examples, beside a model that serves."""

import importlib.util
import threading
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from peft_xmask import ProfileBank, ProfileLearning, learn_profile, train_profiles
from peft_xmask.errors import BaseMismatchError, ConfigError
from peft_xmask.training.learn import Learner
from peft_xmask.training.prefix import Prefix

SCRIPT = Path(__file__).with_name("taught.py")
spec = importlib.util.spec_from_file_location("taught", SCRIPT)
taught = importlib.util.module_from_spec(spec)
spec.loader.exec_module(taught)

LEARNING = ProfileLearning(steps=30)


@pytest.fixture(scope="module")
def bank(tmp_path_factory) -> ProfileBank:
    """Four profiles on the last block of three, so that two blocks come before the first adapted one."""
    folder = tmp_path_factory.mktemp("bank")
    config = taught.config(layers_to_transform=[2], bottleneck_size=8)
    args = taught.arguments(folder, num_train_epochs=3)
    return train_profiles(taught.base(), taught.examples(), config=config, args=args, progress=False)


def labelled(label: int, count: int, seed: int = 9) -> list[dict]:
    return [{**row, "labels": label} for row in taught.examples(seed, {"new": count}).to_list()]


def answers(model, name: str) -> torch.Tensor:
    batch = {"input_ids": torch.tensor([row["input_ids"] for row in labelled(0, 24, seed=10)])}
    with torch.no_grad():
        return model(**batch, adapter_names=[name] * 24).logits


@pytest.mark.parametrize("label", [0, 3])
def test_a_person_is_learnt_and_the_others_stay(bank, label):
    served = bank.attach(taught.base())
    before, state = answers(served, "bob"), {key: value.clone() for key, value in served.state_dict().items()}
    mine = bank.select(bank)
    profile = learn_profile(served, mine, "new", labelled(label, 12), LEARNING)
    assert mine["new"] == profile
    assert "new" not in bank
    assert torch.equal(answers(served, "bob"), before)
    assert all(torch.equal(value, state[key]) for key, value in served.state_dict().items())
    mine.replace(served)
    right = {who: float((answers(served, who).argmax(-1) == label).float().mean()) for who in ("new", "__base__")}
    assert right["new"] > max(0.6, right["__base__"] + 0.3)
    assert torch.equal(answers(served, "bob"), before)


def test_a_bank_learns_by_name_what_learn_profile_learns(bank):
    mine, by_function = bank.select(bank), bank.select(bank)
    served = bank.attach(taught.base())
    found = mine.learn(served, 7, labelled(2, 10), LEARNING)
    assert mine["7"] == found == learn_profile(served, by_function, "7", labelled(2, 10), LEARNING)
    with pytest.raises(ConfigError, match="at least one example"):
        mine.learn(served, "nobody", [])
    assert "nobody" not in mine


def test_the_same_examples_give_the_same_profile(bank):
    served = bank.attach(taught.base())
    first = learn_profile(served, bank.select(bank), "new", labelled(1, 10), LEARNING)
    learn_profile(served, bank.select(bank), "other", labelled(2, 7), LEARNING)
    again = learn_profile(served, bank.select(bank), "new", labelled(1, 10), LEARNING)
    elsewhere = Learner(taught.base(), bank, LEARNING).learn(labelled(1, 10))
    assert first == again == elsewhere


def test_masks_that_do_not_help_are_left_out(bank):
    """A loss that no mask changes: of equals, the profile that deviates least is kept."""
    learning = ProfileLearning(steps=3, example_loss=lambda outputs, batch: 1 + 0 * outputs.logits.sum(-1))
    assert not Learner(taught.base(), bank, learning).learn(labelled(1, 12)).gain_bits.any()


@pytest.mark.parametrize("count", [1, 3, 100])
def test_any_number_of_examples(bank, count):
    profile = Learner(taught.base(), bank, LEARNING).learn(labelled(1, count))
    assert profile.gains.isfinite().all()
    assert profile.gains.any()


def test_what_comes_before_the_first_adapted_block_is_computed_once(bank):
    model = bank.attach(taught.base())
    prefix = Prefix.of(model)
    batch = {"input_ids": torch.tensor(taught.examples()["input_ids"][:3]), "adapter_names": torch.tensor([0, 1, -1])}
    states = prefix.record(model, batch)
    calls = []
    for block in model.get_base_model().bert.encoder.layer:
        block.attention.register_forward_hook(lambda *_: calls.append(1))
    expected = model(**batch).logits
    assert len(calls) == 3
    with prefix.replayed(states):
        assert torch.equal(model(**batch).logits, expected)
    assert len(calls) == 4
    assert torch.equal(model(**batch).logits, expected)
    assert len(calls) == 7
    assert Prefix.of(train_profiles_on_all_blocks()) is None


def train_profiles_on_all_blocks() -> torch.nn.Module:

    return get_peft_model(taught.base(), taught.config())


def test_a_model_that_serves_meanwhile_is_not_disturbed(bank):
    served = bank.attach(taught.base())
    expected = {name: answers(served, name) for name in bank}
    wrong, learning = [], threading.Event()

    def ask() -> None:
        while not learning.is_set():
            wrong.extend(name for name in bank if not torch.equal(answers(served, name), expected[name]))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        for number in range(3):
            learn_profile(served, bank.select(bank), f"new {number}", labelled(number, 8), LEARNING)
    finally:
        learning.set()
        thread.join()
    assert not wrong


def test_a_profile_without_a_mask_goes_on_learning(bank, tmp_path):
    """Its gains are zero, whose logarithm is not finite."""
    mine = bank.select(bank)
    off = mine["bob"]
    mine.put("bob", type(off)(off.bits, torch.zeros_like(off.gain_bits)))
    again = train_profiles(
        taught.base(), taught.examples(7, {"bob": 8}), bank=mine, args=taught.arguments(tmp_path), progress=False
    )
    assert again["bob"].gains.isfinite().all()


def test_what_is_refused(bank):
    with pytest.raises(ConfigError, match="at least one example"):
        learn_profile(taught.base(), bank.select(bank), "new", [])
    with pytest.raises(ConfigError, match="'__base__'"):
        learn_profile(taught.base(), bank.select(bank), "__base__", labelled(1, 4), LEARNING)
    for fields in ({"steps": 0}, {"gain_factors": ()}, {"gain_factors": (-1.0,)}):
        with pytest.raises(ConfigError, match=f"{next(iter(fields))}=.* is invalid"):
            ProfileLearning(**fields)
    other = taught.base()
    with torch.no_grad():
        other.bert.encoder.layer[2].output.dense.weight.neg_()
    with pytest.raises(BaseMismatchError):
        learn_profile(other, bank.select(bank), "new", labelled(1, 4))


def test_a_base_whose_adapter_was_unloaded_before_its_first_pass_runs():
    """Also with another adapter in the place of the first."""

    batch = {"input_ids": torch.tensor(taught.examples()["input_ids"][:3])}
    base = get_peft_model(taught.base(), taught.config()).unload().eval()
    with torch.no_grad():
        assert torch.equal(base(**batch).logits, taught.base()(**batch).logits)
    again = get_peft_model(get_peft_model(taught.base(), taught.config()).unload(), taught.config()).eval()
    assert again(**batch).logits.isfinite().all()
