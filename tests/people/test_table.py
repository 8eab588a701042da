"""The table of people: every unusable cell is named, and a person's newest rows are the test."""

import json

import pytest

from peft_xmask.errors import ConfigError, FileFormatError
from peft_xmask.people.files import read_columns
from peft_xmask.people.table import PeopleTable


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


GOOD = [{"text": f"text {n}", "label": "ab"[n % 2], "user": "xy"[n // 10]} for n in range(20)]


def test_a_persons_oldest_rows_are_for_training_and_the_newest_for_the_test(tmp_path):
    rows = [{**row, "day": f"2026-01-{31 - n:02d}"} for n, row in enumerate(GOOD)]
    table = PeopleTable.read(write(tmp_path / "t.jsonl", rows), time="day")
    counts = {part: len(found) for part, found in table.parts.items()}
    assert counts == {"train": 14, "validation": 2, "test": 4}
    assert [example.text for example in table.parts["test"] if example.who == "x"] == ["text 0", "text 1"]
    assert (table.people, table.labels) == (["x", "y"], ("a", "b"))


def test_a_split_column_is_taken_as_it_is(tmp_path):
    rows = [{**row, "part": ("train", "dev", "TEST")[n % 3]} for n, row in enumerate(GOOD)]
    table = PeopleTable.read(write(tmp_path / "t.jsonl", rows), split="part")
    assert {part: len(found) for part, found in table.parts.items()} == {"train": 7, "validation": 7, "test": 6}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"text": ""}, "row 3, column 'text': expected a text, found ''"),
        ({"text": None}, "row 3, column 'text': expected a text, found nothing"),
        ({"label": None}, "row 3, column 'label': expected a label (a string or a whole number), found nothing"),
        ({"label": 0.5}, "row 3, column 'label': expected a label (a string or a whole number), found 0.5"),
        ({"user": None}, "row 3, column 'user': expected a name or a whole number, found nothing"),
        (
            {"user": "__base__"},
            "row 3, column 'user': expected a name of 1 to 1,024 bytes other than '__base__', found '__base__'",
        ),
    ],
)
def test_an_unusable_cell_is_named_by_row_and_column(change, told, tmp_path):
    rows = [{**row, **(change if number == 2 else {})} for number, row in enumerate(GOOD)]
    with pytest.raises(FileFormatError) as error:
        PeopleTable.read(write(tmp_path / "t.jsonl", rows))
    assert told in str(error.value)
    assert "has 1 unusable cell:" in str(error.value)


def test_many_unusable_cells_are_counted(tmp_path):
    with pytest.raises(FileFormatError, match=r"has 20 unusable cells: row 1, .*; and 15 more\."):
        PeopleTable.read(write(tmp_path / "t.jsonl", [{**row, "label": "x"} for row in GOOD]), task="regression")


def test_whole_numbers_are_names_and_labels(tmp_path):
    rows = [{**row, "user": 7 + n % 2, "label": [10, 9.0, True][n % 3]} for n, row in enumerate(GOOD)]
    table = PeopleTable.read(write(tmp_path / "t.jsonl", rows))
    assert table.people == ["7", "8"]
    assert set(table.labels) == {"10", "9", "True"}


def test_cells_of_a_csv_file_stand_as_they_are(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('text,label\nNone,NA\n"a, b\nc",null\n,1\n', encoding="utf-8")
    assert read_columns(str(path), ["text", "label"]) == {
        "text": ["None", "a, b\nc", None],
        "label": ["NA", "null", "1"],
    }
    path.write_text("text,label\nonly one\n")
    with pytest.raises(FileFormatError, match="Expected 2 cells in line 2 of"):
        read_columns(str(path), ["text"])


def test_several_labels_at_once(tmp_path):
    rows = [{**row, "label": [["a"], "b|c", []][n % 3]} for n, row in enumerate(GOOD)]
    table = PeopleTable.read(write(tmp_path / "t.jsonl", rows), task="multi-label")
    assert table.labels == ("a", "b", "c")
    assert [example.label for example in table.parts["train"][:3]] == [(0,), (1, 2), ()]


def test_what_nothing_can_be_learnt_from_is_refused(tmp_path):
    one = write(tmp_path / "t.jsonl", [{**row, "label": "a"} for row in GOOD])
    with pytest.raises(FileFormatError, match="at least two different labels"):
        PeopleTable.read(one)
    with pytest.raises(ConfigError, match="task='ranking' is unknown"):
        PeopleTable.read(one, task="ranking")
    with pytest.raises(FileFormatError, match="Expected a column 'who'"):
        PeopleTable.read(one, who="who")


def test_a_dataset_in_a_folder_is_read_too(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(GOOD)
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=table, extra=table.select(range(4))).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train.jsonl", GOOD)
    for name in ("saved", "splits", "files"):
        read = PeopleTable.read(str(tmp_path / name))
        assert [example.text for example in read.parts["test"]] == ["text 8", "text 9", "text 18", "text 19"]
    assert len(read_columns(str(tmp_path / "splits"), ["text"], "extra")["text"]) == 4
    with pytest.raises(ConfigError, match="the splits train, extra"):
        PeopleTable.read(str(tmp_path / "splits"), hub_split="test")
    with pytest.raises(ConfigError, match=r"'nobody/such-a-dataset'.*could not be read"):
        PeopleTable.read("nobody/such-a-dataset")


def test_texts_for_a_language_model(tmp_path):
    path = write(tmp_path / "t.jsonl", [{**row, "reply": f"reply to {row['text']}"} for row in GOOD])
    texts = PeopleTable.read(path, task="causal-lm")
    assert (texts.labels, {example.label for example in texts.parts["train"]}) == ((), {""})
    replies = PeopleTable.read(path, task="causal-lm", label="reply")
    assert replies.parts["train"][0].label == "reply to text 0"
    broken = [{**row, "reply": "" if n == 4 else "r"} for n, row in enumerate(GOOD)]
    with pytest.raises(FileFormatError, match="row 5, column 'reply': expected a text, found ''"):
        PeopleTable.read(write(tmp_path / "b.jsonl", broken), task="causal-lm", label="reply")
