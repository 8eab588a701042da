"""A small table of people who disagree, and a bank made of it."""

import json
import random
from pathlib import Path

import pytest

from peft_xmask.people.personalize import Personalized, personalize
from peft_xmask.people.settings import PersonalizeSettings
from peft_xmask.people.table import PeopleTable

PEOPLE = ("ann", "bob", "cid", "dora")
SUBJECTS = ("horror film", "love story", "war drama", "cartoon", "western", "musical")


def rows() -> list[dict[str, object]]:
    """Ann and Cid like everything three points more than Bob and Dora."""
    draw = random.Random(0)
    found = []
    for who in PEOPLE:
        for number in range(20):
            subject = draw.choice(SUBJECTS)
            rating = (
                5 + SUBJECTS.index(subject) / 5 + (1.5 if who in ("ann", "cid") else -1.5) + draw.uniform(-0.3, 0.3)
            )
            found.append({"text": f"{subject} number {number}", "rating": round(rating, 2), "who": who})
    return found


@pytest.fixture(scope="session")
def people_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("people") / "ratings.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def people_table(people_file) -> PeopleTable:
    return PeopleTable.read(str(people_file), label="rating", who="who", task="regression")


@pytest.fixture(scope="session")
def small() -> PersonalizeSettings:
    return PersonalizeSettings(max_length=16, num_adapters=16, bottleneck_size=4, layers=1, epochs=1.0)


@pytest.fixture(scope="session")
def personalized(minilm, people_table, small, tmp_path_factory) -> tuple[Path, Personalized]:
    out = tmp_path_factory.mktemp("bank") / "bank"
    return out, personalize(minilm, people_table, out, small)
