"""How a new person of a live bank is learnt."""

import json

import pytest
import torch

from peft_xmask import Learner, LiveBank, ProfileBank
from peft_xmask.people.live import LivePredictor
from peft_xmask.people.personalize import personalize
from peft_xmask.people.settings import PersonalizeSettings
from peft_xmask.people.table import PeopleTable
from peft_xmask.training.offsets import SharedOutputs, fit_offsets

from .conftest import PEOPLE, SUBJECTS


@pytest.fixture(scope="module", params=["classification", "multi-label"])
def task(request):
    return request.param


@pytest.fixture(scope="module")
def bank(task, minilm, tmp_path_factory):
    """Of people who like a text or not: Ann and Cid like four subjects of six, Bob and Dora two of them."""
    folder = tmp_path_factory.mktemp("likes")
    with (folder / "likes.jsonl").open("w", encoding="utf-8") as stream:
        for who in PEOPLE:
            for number in range(20):
                text = f"{SUBJECTS[number % len(SUBJECTS)]} number {number}"
                likes = number % 6 >= (2 if who in ("ann", "cid") else 4)
                stream.write(json.dumps({"text": text, "label": "yes" if likes else "no", "user": who}) + "\n")
    table = PeopleTable.read(str(folder / "likes.jsonl"), task=task)
    settings = PersonalizeSettings(max_length=16, num_adapters=16, bottleneck_size=4, layers=1, epochs=1.0)
    done = personalize(minilm, table, folder / "bank", settings)
    assert list(done.bank) == list(PEOPLE)
    return folder / "bank"


@pytest.mark.parametrize("count", [12, 48])
def test_a_new_persons_mask_is_for_what_the_offset_leaves(count, task, bank, minilm, tmp_path):
    """With a mask beside it, from forty labels on, as without one."""
    LiveBank.create(tmp_path / "live", ProfileBank.from_pretrained(bank))
    predictor = LivePredictor.open(tmp_path / "live", minilm)
    texts = [f"{SUBJECTS[number % len(SUBJECTS)]} number {number}" for number in range(count)]
    profile = predictor.learn("eve", [(text, "yes") for text in texts])
    encoded = predictor.tokenizer(texts, truncation=True, max_length=16)
    yes = [float(name == "yes") for name in predictor.head.labels]
    label = yes if task == "multi-label" else yes.index(1.0)
    rows = [
        {**dict(zip(encoded, values, strict=True)), "labels": label} for values in zip(*encoded.values(), strict=True)
    ]
    learner = Learner(predictor.model, ProfileBank.from_pretrained(bank), processing_class=predictor.tokenizer)
    expected = learner.learn(rows)
    for mine, theirs in zip(profile.parts, expected.parts, strict=True):
        assert torch.equal(mine, theirs)

    def scores(who):
        return torch.tensor(
            [[each.scores[name] for name in predictor.head.labels] for each in predictor.predict(texts, who)]
        )

    common = scores(None)
    logits = common.logit() if task == "multi-label" else common.log()
    shared = SharedOutputs(logits, torch.tensor([label] * count))
    variance = ProfileBank.from_pretrained(bank).config.training["offset_variance"]
    offset = fit_offsets(shared, torch.zeros(count, dtype=torch.long), 1, variance)[0]
    torch.testing.assert_close(profile.offsets, offset, atol=5e-3, rtol=5e-3)
    assert (scores("eve") * torch.tensor(yes)).sum() > (common * torch.tensor(yes)).sum()
