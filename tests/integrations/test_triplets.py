"""People with a similarity of their own over the real MiniLM, trained and served through sentence-transformers."""

import pytest
import torch
from transformers import TrainingArguments

from peft_xmask import ProfileBank, XPEFTConfig, train_profiles
from peft_xmask.errors import ConfigError
from peft_xmask.integrations.triplets import TripletModel

sentence_transformers = pytest.importorskip("sentence_transformers")

WESTERNS = ["A western of 1950", "Gunfight at the canyon", "The sheriff rides again", "The long cattle drive"]
HORROR = ["The haunted cellar", "Night of the vampire", "A curse in the woods", "The thing in the attic"]
NEW = ["The last outlaw", "Riders of the prairie", "Return of the werewolf"]


def triplets():
    """For ann westerns are alike and horror is not; for bob it is the other way round."""
    kinds = {"ann": (WESTERNS, HORROR), "bob": (HORROR, WESTERNS)}
    return [
        {"anchor": like[i], "positive": like[i - 1], "negative": other[i], "user": user}
        for user, (like, other) in kinds.items()
        for i in range(len(like))
    ]


@pytest.fixture
def embedder(minilm):
    return lambda: sentence_transformers.SentenceTransformer(str(minilm), device="cpu")


@pytest.fixture
def trained(embedder, tmp_path):
    """The model that was trained, and its bank."""
    model = TripletModel(embedder())
    args = TrainingArguments(
        str(tmp_path / "run"), num_train_epochs=6, per_device_train_batch_size=8, learning_rate=1e-2, report_to=[],
        save_strategy="no", use_cpu=True, seed=1,
    )  # fmt: skip
    bank = train_profiles(
        model, triplets(), validation=triplets(), config=XPEFTConfig(layers_to_transform=[4, 5]), args=args,
        head="frozen", data_collator=model.collate, example_loss=model.losses, progress=False,
    )  # fmt: skip
    return model, bank


def test_people_have_a_similarity_of_their_own_which_sentence_transformers_serves(trained, embedder, tmp_path):
    _, bank = trained
    for metrics in bank.metrics.values():
        assert metrics["validation_loss"] < 0.5 * metrics["shared_loss"]
    bank.save_pretrained(tmp_path / "bank")
    served, plain = embedder(), embedder().encode(NEW)
    served[0].model = ProfileBank.from_pretrained(tmp_path / "bank").attach(served[0].model)
    vectors = {}
    for name in ("ann", "bob", "__base__"):
        served[0].model.set_profile(name)
        vectors[name] = torch.from_numpy(served.encode(NEW))
    assert torch.equal(vectors["__base__"], torch.from_numpy(plain))

    def likeness(name, first, second):
        return float(vectors[name][first] @ vectors[name][second])

    assert likeness("ann", 0, 1) - likeness("ann", 0, 2) > likeness("bob", 0, 1) - likeness("bob", 0, 2)


def test_the_margin_of_each_example_is_that_of_its_own_profile(trained, embedder):
    """A batch of two people, against each alone through sentence-transformers."""
    _, bank = trained
    row = {"anchor": NEW[0], "positive": NEW[1], "negative": NEW[2]}
    plain = TripletModel(embedder(), scale=10.0)
    model = bank.attach(plain).eval()
    batch = plain.collate([row, row, row])
    with torch.no_grad():
        found = model(**batch, adapter_names=["ann", "bob", "__base__"])
    served = embedder()
    served[0].model = bank.attach(served[0].model)
    for place, name in enumerate(("ann", "bob", "__base__")):
        served[0].model.set_profile(name)
        first, near, far = torch.from_numpy(served.encode(NEW))
        assert float(found["margin"][place]) == pytest.approx(float(first @ near - first @ far), abs=1e-5)
    losses = plain.losses(found, batch)
    assert float(losses.mean()) == pytest.approx(float(found["loss"]))
    assert losses[0] == pytest.approx(float(torch.log1p(torch.exp(-10 * found["margin"][0]))))


def test_triplets_without_a_column_and_a_scale_of_zero_are_refused(embedder):
    with pytest.raises(ConfigError, match="in negative"):
        TripletModel(embedder()).collate([{"anchor": "a", "positive": "b"}])
    with pytest.raises(ConfigError, match="above 0"):
        TripletModel(embedder(), scale=0)
