"""Names and their rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_xmask.bank.names import NameIndex
from peft_xmask.errors import ConfigError, FileFormatError

names_of_profiles = st.lists(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(lambda name: name != "__base__"), unique=True
)


@settings(deadline=None, max_examples=60)
@given(names_of_profiles)
def test_every_name_is_found_at_its_row_and_no_other_is(names):
    index = NameIndex.build(names)
    assert list(index) == names
    assert [index.find(name) for name in names] == list(range(len(names)))
    assert index.find("".join(names) + "x") is None
    assert index.find("") is None


def test_the_layout_is_pinned():
    """Golden numbers: what docs/bank-format.md promises to readers in other languages."""
    index = NameIndex.build(["bob", "ann", "Zoë"])
    assert index.tensors["names"].numpy().tobytes() == "bobannZoë".encode()
    assert index.tensors["ends"].tolist() == [3, 6, 10]
    assert index.tensors["rows"].tolist() == [0, 2, 1]
    assert index.tensors["hashes"].tolist() == [-7880060502512241804, -7311049096717426824, -6488803333072012659]
    assert [tensor.dtype for tensor in index.tensors.values()] == [torch.int64, torch.int32, torch.int64, torch.uint8]


def test_names_whose_hashes_are_equal_are_told_apart(monkeypatch):
    monkeypatch.setattr("peft_xmask.bank.names.hash_of", lambda encoded: 7)
    index = NameIndex.build(["a", "b", "c"])
    assert [index.find(name) for name in "abcd"] == [0, 1, 2, None]
    with pytest.raises(ConfigError, match="'b' for rows 1 and 3"):
        NameIndex.build(["a", "b", "c", "b"])


@pytest.mark.parametrize("name", ["", "__base__", "x" * 1025, "\ud800", 7, None, b"bytes"])
def test_what_cannot_be_a_name_is_refused(name):
    with pytest.raises(ConfigError, match="name"):
        NameIndex.build(["fine", name])


@settings(deadline=None, max_examples=100)
@given(
    st.text(st.characters(exclude_categories=[]), max_size=400)
    | st.sampled_from("a\u00e9\u5f20\ud800").map(lambda c: c * 1024)
)
def test_any_text_is_a_name_or_is_refused(name):
    """Lone surrogates and zeros among them."""
    assert NameIndex.build(["fine"]).find(name) in (0, None)
    try:
        index = NameIndex.build([name])
    except ConfigError:
        assert name in ("", "__base__") or len(name.encode("utf-8", "surrogatepass")) > 1024 or max(name) > "\ud7ff"
    else:
        assert list(index) == [name]
        assert index.find(name) == 0


def test_a_name_that_comes_twice_is_refused():
    with pytest.raises(ConfigError, match="'ann' for rows 0 and 2"):
        NameIndex.build(["ann", "bob", "ann"])


def test_damaged_tensors_are_refused_or_lead_nowhere():
    whole = NameIndex.build(["ann", "bob"]).tensors
    with pytest.raises(FileFormatError, match="one length"):
        NameIndex({**whole, "rows": whole["rows"][:1]})
    with pytest.raises(FileFormatError, match="hashes"):
        NameIndex({name: tensor for name, tensor in whole.items() if name != "hashes"})
    with pytest.raises(FileFormatError, match="bytes of names"):
        NameIndex({**whole, "names": whole["names"][:5]})
    wild = NameIndex({**whole, "rows": torch.tensor([99, -3], dtype=torch.int32)})
    assert wild.find("ann") is None
    assert wild.find("bob") is None
    crossed = NameIndex({**whole, "ends": torch.from_numpy(np.array([9, 6], dtype=np.int64))})
    with pytest.raises(FileFormatError, match="row 0"):
        list(crossed)
