"""Offsets, strengths of masks, and which layers a profile keeps."""

import importlib.util
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from peft_xmask import Learner, ProfileBank, ProfileLearning, train_profiles
from peft_xmask.core.packing import pack_halves, unpack_halves
from peft_xmask.errors import ConfigError
from peft_xmask.training import common
from peft_xmask.training.choice import STRENGTHS, _strengths
from peft_xmask.training.offset_prior import likeliest_variance
from peft_xmask.training.offsets import SharedOutputs

SCRIPT = Path(__file__).with_name("taught.py")
spec = importlib.util.spec_from_file_location("taught", SCRIPT)
taught = importlib.util.module_from_spec(spec)
spec.loader.exec_module(taught)


COMMON = dict.fromkeys(taught.COUNTS, 60)


def fit(folder, **fields):
    settings = {"validation": taught.examples(1), "config": taught.config(), "args": taught.arguments(folder)}
    return train_profiles(taught.base(), taught.examples(), **{"progress": False, "offset": True, **settings, **fields})


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """Profiles of which each has a label of its own, which is what an offset can say."""
    return fit(tmp_path_factory.mktemp("offsets"))


def logits(model, names) -> torch.Tensor:
    batch = {"input_ids": torch.tensor(taught.examples(5, {"x": len(names)})["input_ids"])}
    with torch.no_grad():
        return model(**batch, adapter_names=names).logits


@pytest.mark.parametrize("each", [3, 30])
@pytest.mark.parametrize(("size", "expected"), [(0.0, 0.03), (1.0, 1.0), (3.0, 3.0)])
def test_the_variance_is_that_of_the_profiles_offsets(size, expected, each):
    generator = torch.Generator().manual_seed(0)
    offsets = size * torch.randn(300, 3, generator=generator)
    rows = torch.arange(300).repeat_interleave(each)
    labels = offsets[rows].softmax(1).multinomial(1, generator=generator)[:, 0]
    assert likeliest_variance(SharedOutputs(torch.zeros(len(rows), 3), labels), rows) == expected


@pytest.mark.parametrize("helps", [True, False])
def test_profiles_of_similar_counts_decide_on_a_strength_together(helps):
    """Few examples: masks do harm. Many: they help, most at half their strength."""
    counts = torch.tensor([5] * 30 + [100] * 30)
    strengths = torch.tensor(STRENGTHS, dtype=torch.float64).unsqueeze(1)
    noise = 0.1 * torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    losses = 1 + noise + torch.where(counts == 5, strengths, (strengths - 0.5) ** 2 - 0.25 if helps else 0 * strengths)
    strength, found = _strengths(losses, counts, torch.full((60,), 3))
    assert not strength[:30].any()
    assert (strength[30:] == (0.5 if helps else 0.0)).all()
    place = STRENGTHS.index(0.5) if helps else 0
    assert torch.equal(found[30:], losses[place, 30:])


def test_a_mask_that_helps_by_chance_only_is_dropped():
    losses = torch.ones(len(STRENGTHS), 40, dtype=torch.float64)
    losses[1:] += torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.05
    strength, _ = _strengths(losses, torch.full((40,), 8), torch.full((40,), 3))
    assert not strength.any()


def test_offsets_are_saved_and_served(bank, tmp_path):
    assert bank.offset_count == 4
    bank.save_pretrained(tmp_path / "bank")
    served = ProfileBank.from_pretrained(tmp_path / "bank").attach(taught.base())
    plain = PeftModel.from_pretrained(taught.base(), tmp_path / "bank").eval()
    names, rows = [*bank, "__base__"], torch.tensor([0, 1, 2, 3, -1])
    found = logits(served, names)
    assert torch.equal(logits(plain, rows), found)
    for row, name in enumerate(bank):
        assert bank.metrics[name]["layers"]
        served.set_profile(name)
        batch = {"input_ids": torch.tensor(taught.examples(5, {"x": 5})["input_ids"])}
        with torch.no_grad():
            torch.testing.assert_close(served(**batch).logits[row], found[row])
    with torch.no_grad(), served.disable_adapter():
        base = served(**batch).logits
    masks = bank.select(bank)
    for name in bank:
        profile = bank[name]
        masks.put(name, type(profile)(profile.bits, torch.zeros_like(profile.gain_bits), profile.offset_bits))
    alone = logits(masks.attach(taught.base()), names)
    offsets = torch.stack([*(unpack_halves(bank[name].offset_bits) for name in bank), torch.zeros(4)])
    torch.testing.assert_close(alone, logits(served, ["__base__"] * 5) + offsets)
    assert not torch.equal(found[:4], base[:4])


def test_several_labels_of_each_example(tmp_path):
    """Each person's texts have two labels of four, always the same: an offset says that for a new person too."""

    def several(dataset):
        return dataset.map(lambda row: {"labels": [float((row["labels"] + by) % 4 < 2) for by in range(4)]})

    base = taught.base()
    base.config.problem_type = "multi_label_classification"
    bank = train_profiles(
        base, several(taught.examples()), validation=several(taught.examples(1)), config=taught.config(),
        args=taught.arguments(tmp_path), offset=True, progress=False,
    )  # fmt: skip
    for number, name in enumerate(bank):
        wanted = torch.tensor([(number + by) % 4 < 2 for by in range(4)])
        assert torch.equal(bank[name].offsets > 0, wanted)
        assert bank.metrics[name]["validation_loss"] < bank.metrics[name]["shared_loss"]
    learnt = bank.learn(base, "eve", several(taught.examples(7, {"x": 0, "eve": 12})))
    assert torch.equal(learnt.offsets > 0, torch.tensor([(1 + by) % 4 < 2 for by in range(4)]))


def test_a_profile_with_offset_and_mask_is_no_worse_than_one_without(bank):
    for facts in bank.metrics.values():
        assert facts["validation_loss"] <= facts["shared_loss"]
    assert {"offset", "mask"} >= {layer for facts in bank.metrics.values() for layer in facts["layers"]}


def test_new_profiles_join_with_offsets_and_the_others_keep_theirs(bank, tmp_path):
    args = taught.arguments(tmp_path, num_train_epochs=1)
    joined = train_profiles(
        taught.base(), taught.examples(5, {"dan": 9}), bank=bank, offset=True, args=args, progress=False
    )
    assert all(joined[name] == bank[name] for name in bank)
    assert joined["dan"].offset_bits.any()
    again = train_profiles(taught.base(), taught.examples(5, {"bob": 9}), bank=bank, args=args, progress=False)
    assert torch.equal(again["bob"].offset_bits, bank["bob"].offset_bits)


def test_a_person_is_learnt_with_an_offset(bank):
    rows = [{**row, "labels": 2} for row in taught.examples(9, {"new": 12}).to_list()]
    profile = Learner(taught.base(), bank, ProfileLearning(steps=2)).learn(rows)
    assert int(profile.offsets.argmax()) == 2
    assert profile == Learner(taught.base(), bank, ProfileLearning(steps=2)).learn(rows)


def test_a_person_who_said_little_has_the_offset_alone(bank):
    """So few examples cannot tell a mask from chance; without 0 among the factors, a mask is wanted all the same."""
    rows = [{**row, "labels": 2} for row in taught.examples(9, {"new": 10}).to_list()]
    few = Learner(taught.base(), bank, ProfileLearning(steps=2)).learn(rows[:9])
    assert not few.gains.any()
    assert int(few.offsets.argmax()) == 2
    wanted = Learner(taught.base(), bank, ProfileLearning(steps=2, gain_factors=(1.0,)))
    assert wanted.learn(rows[:9]).gains.any()
    least = Learner(taught.base(), bank, ProfileLearning(steps=2, min_examples=0))
    assert not torch.equal(least.learn(rows[:9]).bits, few.bits)


def test_what_offsets_cannot_do(bank, tmp_path):
    with pytest.raises(ConfigError, match="head='joint'"):
        fit(tmp_path, head="joint")
    without = fit(tmp_path / "without", offset=False)
    with pytest.raises(ConfigError, match="whose profiles have offsets"):
        fit(tmp_path, bank=without, config=None)
    served = bank.attach(taught.base())
    with pytest.raises(ConfigError, match="adds offsets"):
        served.merge_and_unload()
    damaged = bank.select(["bob"])
    profile = damaged["bob"]
    infinite = pack_halves(torch.full((4,), torch.inf))
    content = damaged.content()
    served.base_model.table.serve("bank", content.bits, content.gain_bits, content.names, infinite.unsqueeze(0))
    with pytest.raises(Exception, match="finite offsets"):
        logits(served, [0])
    assert profile.offset_bits is not None


def test_a_common_part_is_trained_first_and_always_on(tmp_path, monkeypatch):
    """Without a profile the bank answers as the common adapter did, with its head."""
    data, made = taught.examples(0, COMMON), []

    def noted(*args):
        made.append(trained(*args))
        return made[-1]

    trained = common._trained
    monkeypatch.setattr(common, "_trained", noted)
    fields = dict(
        common_size=8, common_learning_rate=1e-2, validation=taught.examples(1, COMMON), progress=False,
        config=taught.config(num_adapters=8), args=taught.arguments(tmp_path / "run", num_train_epochs=1),
    )  # fmt: skip
    model = taught.base()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    bank = train_profiles(model, data, **fields)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    bank.save_pretrained(tmp_path / "bank")
    served = ProfileBank.from_pretrained(tmp_path / "bank").attach(taught.base())
    batch = {key: torch.tensor(data[key]) for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        shared = served(**batch, adapter_names=["__base__"] * len(data)).logits
        expected = made[0].eval()(**batch).logits
        plain = taught.base()(**batch).logits
    torch.testing.assert_close(shared, expected)
    assert (shared - plain).abs().mean() > 0.1
    again = train_profiles(taught.base(), data, **fields)
    assert len(made) == 1
    assert all(again[name] == bank[name] for name in bank)
    with pytest.raises(ConfigError, match=r"common part of another run.*examples="):
        train_profiles(taught.base(), taught.examples(3, COMMON), **fields)
    with pytest.raises(ConfigError, match="common_size="):
        train_profiles(taught.base(), data, bank=bank, common_size=8, args=fields["args"], progress=False)
