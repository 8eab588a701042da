"""A pool of a few directions that a head reads."""

import json

import pytest
import torch
from peft import get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from peft_xmask import AdapterPool, Learner, ProfileBank, ProfileLearning, XPEFTConfig, few_directions
from peft_xmask.errors import ConfigError

SIZES = dict(
    vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.5,
)  # fmt: skip
LAST = XPEFTConfig(task_type="SEQ_CLS", layers_to_transform=[1])


def base(num_labels: int = 1) -> torch.nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES, num_labels=num_labels)).eval()


def texts(count: int = 200, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(1, 60, (count, 6), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "attention_mask": torch.ones(6, dtype=torch.long)} for row in ids]


def pool(model: torch.nn.Module, **fields: object) -> AdapterPool:
    return few_directions(model, texts(), **{"config": LAST, "size": 40, **fields})


def outputs(model: torch.nn.Module, count: int = 200) -> torch.Tensor:
    batch = {key: torch.stack([each[key] for each in texts(count)]) for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return model.eval()(**batch).logits


def reaching(made: AdapterPool, model: torch.nn.Module, wanted: torch.Tensor) -> torch.nn.Module:
    """A model whose only profile has about these coefficients."""
    adapted = get_peft_model(model, XPEFTConfig(pool=made, task_type="SEQ_CLS"))
    masks = adapted.masks("default")
    with torch.no_grad():
        masks.logits.weight.copy_((made.fitting.coefficients @ wanted).repeat(2)[None])
    own = masks.form.masks(masks.form.logits(masks.logits.weight), masks.gain.weight).mask[0, 1, 0]
    found = own @ made.fitting.coefficients
    assert torch.cosine_similarity(found, wanted, dim=0) > 0.9
    return adapted


def test_a_profile_starts_at_the_model_as_it_is():
    model = base()
    before = outputs(model)
    made = pool(model)
    assert torch.equal(outputs(model), before)
    adapted = get_peft_model(model, XPEFTConfig(pool=made, task_type="SEQ_CLS", num_profiles=3))
    adapted.set_profile(2)
    torch.testing.assert_close(outputs(adapted), before, atol=1e-5, rtol=1e-5)
    assert made.target_modules == ["bert.encoder.layer.1.output.dense"]


@pytest.mark.parametrize("deviation", [0.02, 0.1])
def test_a_coefficient_of_one_changes_outputs_by_the_deviation(deviation):
    """In the mean over the directions, since texts differ most along the first."""
    model = base()
    before, sizes = outputs(model), []
    for number in range(3):
        made = pool(model, deviation=deviation)
        wanted = torch.zeros(3)
        wanted[number] = 1.0
        adapted = reaching(made, base(), wanted)
        masks = adapted.masks("default")
        with torch.no_grad():
            own = masks.form.masks(masks.form.logits(masks.logits.weight), masks.gain.weight)
            reached = own.mask[0, 1, 0] @ made.fitting.coefficients * own.gain[0, 0]
        sizes.append(float((outputs(adapted) - before).std() / reached.norm()))
    assert sum(sizes) / 3 == pytest.approx(deviation, rel=0.4)
    assert sizes[0] > sizes[2]


def test_classes_deviate_in_as_many_ways_as_the_head_tells_apart():
    assert pool(base(2)).fitting.principal == 3
    assert pool(base(3), principal=2).fitting.principal == 4
    assert pool(base(9), principal=1).fitting.principal == 4


def test_it_is_saved_with_what_it_was_made_from(tmp_path):
    made = pool(base(3))
    made.save_pretrained(tmp_path)
    again = AdapterPool.from_pretrained(tmp_path)
    assert again.fingerprint == made.fingerprint
    assert "| kind | few directions |" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "pool.json").read_text())["fitting"]["texts"] == 200
    assert pool(base(3)).fingerprint == made.fingerprint
    assert pool(base(3), seed=1).fingerprint != made.fingerprint


def test_a_person_is_learnt_over_it():
    """Somebody who answers along the first direction of the texts; the prior decides how far the profile goes."""
    model = base()
    made = pool(model, deviation=0.5)
    bank = ProfileBank.from_model(
        get_peft_model(base(), XPEFTConfig(pool=made, task_type="SEQ_CLS", num_profiles=1)), ["start"]
    )
    teacher = outputs(reaching(made, base(), torch.tensor([2.0, 0.0, 0.0])))
    said = [{**text, "labels": float(label)} for text, label in zip(texts(), teacher, strict=True)]
    far = torch.stack([(outputs(model)[100:] - teacher[100:]).square().mean()])
    found = []
    for count in (4, 100):
        profile = Learner(base(), bank, ProfileLearning(steps=20)).learn(said[:count])
        bank.put("new", profile)
        served = bank.attach(base())
        served.set_profile("new")
        found.append(float((outputs(served)[100:] - teacher[100:]).square().mean()))
    assert found[1] < 0.6 * float(far)
    assert found[1] < found[0] <= float(far) * 1.001


def test_what_it_cannot_be_made_from_is_refused():
    with pytest.raises(ConfigError, match="at least two texts"):
        few_directions(base(), texts(1), config=LAST)
    with pytest.raises(ConfigError, match="principal=0"):
        pool(base(), principal=0)
    with pytest.raises(ConfigError, match="size=6 is too small"):
        pool(base(), size=6)
    blind = base()
    torch.nn.init.zeros_(blind.classifier.weight)
    with pytest.raises(ConfigError, match="Train the head first"):
        pool(blind)
    assert not any("xmask" in name or "xpeft" in name for name, _ in blind.named_modules())
