"""From a table to a bank that answers as each person would."""

import json

import pytest

from peft_xmask import ProfileBank
from peft_xmask.errors import ConfigError
from peft_xmask.people.personalize import personalize
from peft_xmask.people.predictor import Predictor
from peft_xmask.people.settings import PersonalizeSettings

TEXT = "western number 3"


def test_the_report_says_what_each_layer_brings(personalized):
    out, done = personalized
    layers = {layer.name: layer for layer in done.report.layers}
    assert layers["+ offset"].overall < 0.6 * layers["common part"].overall
    assert (layers["common part"].nbytes, layers["+ offset"].nbytes) == (0, 2)
    assert done.report.people == len(done.bank) == 4
    assert done.report.gain == pytest.approx(
        min(layers["common part"].overall, layers["one answer for all texts"].overall) - done.report.layers[-1].overall
    )
    assert list(ProfileBank.from_pretrained(out)) == ["ann", "bob", "cid", "dora"]
    json.dumps(done.report.to_dict())


def test_the_saved_bank_answers_as_each_person_and_as_nobody(personalized):
    predictor = Predictor.from_pretrained(personalized[0])
    ann, bob, nobody, stranger = predictor.predict([TEXT] * 4, ["ann", "bob", None, "eve"])
    assert ann.value - bob.value > 2
    assert bob.value < nobody.value < ann.value
    assert stranger.value == pytest.approx(nobody.value, abs=1e-4)
    assert [answer.personal for answer in (ann, bob, nobody, stranger)] == [True, True, False, False]
    alone = predictor.predict([TEXT], "ann")[0]
    assert alone.value == pytest.approx(ann.value, abs=1e-4)
    assert predictor.predict([]) == []
    with pytest.raises(ConfigError, match="a name for each of the 1 texts"):
        predictor.predict([TEXT], ["ann", "bob"])


def test_the_command_line_does_the_same(personalized, people_file, minilm, tmp_path, capsys, monkeypatch):
    import io

    from peft_xmask.cli import run

    monkeypatch.setattr("sys.stdin", io.StringIO(f'{TEXT}\n{{"text": "{TEXT}", "who": "ann"}}\n'))
    assert run(["predict", "--bank", str(personalized[0]), "-"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = Predictor.from_pretrained(personalized[0]).predict([TEXT] * 2, [None, "ann"])
    assert [line["scores"]["rating"] for line in lines] == [pytest.approx(each.value, abs=1e-4) for each in expected]
    assert run(["predict", "--bank", str(personalized[0]), "--who", "eve", str(people_file)]) == 2
    assert "No profile 'eve' in the bank" in capsys.readouterr().err
    bad = tmp_path / "bad.csv"
    bad.write_text("text,label,user\nsome text,,ann\n")
    arguments = ["personalize", "--base", str(minilm), "--data", str(bad), "--out", str(tmp_path / "out")]
    assert run(arguments) == 2
    assert "row 1, column 'label'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_settings_and_too_few_labels_are_refused(people_table, minilm, tmp_path):
    for name, value in (("max_length", 1), ("epochs", -1.0), ("mask_learning_rate", 0.0), ("layers", 0)):
        with pytest.raises(ConfigError, match=f"{name}={value} is invalid"):
            PersonalizeSettings(**{name: value})
    with pytest.raises(ConfigError, match="a person with at least 100 training labels"):
        personalize(minilm, people_table, tmp_path / "out", PersonalizeSettings(max_length=8, min_labels=100))


@pytest.mark.parametrize("task", ["classification", "multi-label"])
def test_labels_too(task, minilm, small, tmp_path):
    """Two people who call the same texts by opposite labels."""
    from peft_xmask.people.table import PeopleTable

    path = tmp_path / "labels.jsonl"
    rows = [
        {"text": f"{kind} number {n}", "label": "yes" if (who == "ann") == (n % 6 > 0) else "no", "user": who}
        for n in range(20)
        for kind in ("cat",)
        for who in ("ann", "bob")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    table = PeopleTable.read(str(path), task=task)
    done = personalize(minilm, table, tmp_path / "bank", small)
    ann, bob = Predictor.from_pretrained(tmp_path / "bank").predict(["cat number 1"] * 2, ["ann", "bob"])
    assert ann.scores["yes"] > 0.6 > 0.4 > bob.scores["yes"]
    assert (ann.label, bob.label) == (("yes", "no") if task == "classification" else (("yes",), ("no",)))
    assert done.report.layers[0].name == "one answer for all texts"
