"""The pipeline gives the predictor's answers, for one person or many in a batch."""

import pytest

from peft_xmask import ProfileBank
from peft_xmask.errors import ConfigError
from peft_xmask.people.pipeline import people_pipeline
from peft_xmask.people.predictor import Predictor

TEXTS = ["western number 3", "cartoon number 1, a longer text that is cut where texts were cut in training", "musical"]


def test_a_pipeline_answers_as_the_predictor_does(personalized):
    ask = people_pipeline(personalized[0])
    predictor = Predictor.from_pretrained(personalized[0])
    people = ["ann", "bob", None]
    expected = [answer.value for answer in predictor.predict(TEXTS, people)]
    asked = [{"text": text, "who": who} for text, who in zip(TEXTS, people, strict=True)]
    for size in (1, 3):
        found = [each["score"] for each in ask(asked, batch_size=size)]
        assert found == pytest.approx(expected, abs=1e-3)
    assert ask(TEXTS[0], who="ann")[0]["score"] == pytest.approx(expected[0], abs=1e-3)
    nobody = predictor.predict([TEXTS[0]])[0].value
    assert ask([TEXTS[0]])[0]["score"] == pytest.approx(nobody, abs=1e-3)
    assert ask([TEXTS[0]], who="stranger")[0]["score"] == pytest.approx(nobody, abs=1e-3)


def test_labels_have_their_names(minilm, small, tmp_path):
    import json

    from peft_xmask.people.personalize import personalize
    from peft_xmask.people.table import PeopleTable

    rows = [
        {"text": f"cat number {n}", "label": "yes" if (who == "ann") == (n % 6 > 0) else "no", "user": who}
        for n in range(20)
        for who in ("ann", "bob")
    ]
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    personalize(minilm, PeopleTable.read(str(path)), tmp_path / "bank", small)
    ask = people_pipeline(ProfileBank.from_pretrained(tmp_path / "bank"))
    text = "cat number 1"
    assert [ask(text, who=who)[0]["label"] for who in ("ann", "bob")] == ["yes", "no"]
    scores = {each["label"]: each["score"] for each in ask(text, who="ann", top_k=None)}
    assert scores == pytest.approx(Predictor.from_pretrained(tmp_path / "bank").predict([text], "ann")[0].scores)


def test_other_inputs_are_refused(personalized):
    ask = people_pipeline(personalized[0])
    with pytest.raises(ConfigError, match="'who'"):
        ask([{"text": "a", "whom": "ann"}])
    with pytest.raises(ConfigError, match="one name as who="):
        ask(["a", "b"], who=["ann", "bob"])
