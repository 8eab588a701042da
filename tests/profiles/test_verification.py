"""A bank is checked row by row: what is wrong is named, and nothing that is right."""

import json

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from peft_xmask.bank.names import NameIndex
from peft_xmask.bank.storage import BITS, GAIN_BITS
from peft_xmask.errors import ConfigError
from peft_xmask.profiles import ProfileBank, verify_bank

MODEL = "adapter_model.safetensors"


def names_file(folder):
    return next(folder.glob("profiles-*.safetensors"))


def rewrite(path, change) -> None:
    with safe_open(str(path), framework="pt") as opened:
        metadata = dict(opened.metadata())
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


@pytest.fixture
def folder(bank, tmp_path):
    bank.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("fields", [{}, {"mask_type": "soft"}, {"learn_gain": False, "num_adapters": 16}])
def test_what_was_saved_is_sound(fields, many_profiles, tmp_path):
    ProfileBank.from_model(many_profiles(**fields)).save_pretrained(tmp_path / "bank")
    many_profiles(**fields).save_pretrained(tmp_path / "adapter")
    for kind in ("bank", "adapter"):
        found = verify_bank(tmp_path / kind)
        assert (found.profiles, found.total, found.problems) == (5, 0, ())


def test_each_wrong_row_is_named_with_what_is_wrong(folder):
    def change(tensors):
        tensors[BITS][1, 0, 2, 0] ^= 1
        tensors[BITS][3, 1, 1] = torch.tensor([255, 3, 0b00010000], dtype=torch.uint8) ^ 1  # ten ones, one beyond 20
        tensors[BITS][3, 1, 2, 0] ^= 1
        tensors[GAIN_BITS][4, 1] = torch.tensor([0, 0x7C], dtype=torch.uint8)

    rewrite(folder / MODEL, change)
    found = verify_bank(folder)
    assert found.total == 3
    assert [(problem.row, problem.name) for problem in found.problems] == [(1, "bob"), (3, "ann.b"), (4, "张伟")]
    said = [str(problem) for problem in found.problems]
    assert said[0].startswith("row 1 ('bob'): expected the down-mask of site 2 with exactly top_k=10 ones")
    assert "up-mask of site 1" in said[1]
    assert "in 3 bytes (2 masks" in said[1]
    assert "finite gain at site 1" in said[2]


def test_soft_masks_that_are_no_numbers(many_profiles, tmp_path):
    ProfileBank.from_model(many_profiles(mask_type="soft")).save_pretrained(tmp_path)
    rewrite(tmp_path / MODEL, lambda tensors: tensors[BITS][2, 1, 0].fill_(255))
    (problem,) = verify_bank(tmp_path).problems
    assert problem.row == 2
    assert "up-mask of site 0 with finite logits" in problem.text


def replaced(folder, names: list[bytes], **tensors) -> None:
    """Other names in the file of names, whose name stays."""
    index = NameIndex.build([f"{row}" for row in range(len(names))]).tensors
    ends = torch.tensor([len(name) for name in names]).cumsum(0)
    index |= {"names": torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8), "ends": ends, **tensors}
    save_file(index, names_file(folder))


def test_names_that_cannot_be(folder):
    replaced(folder, [b"a", b"\xff\xfe", b"__base__", b"x" * 1025, b"a"])
    found = verify_bank(folder)
    said = [str(problem) for problem in found.problems]
    assert "no such file" in said[0]  # the digest in the file's name is of other names
    for row, words in ((1, "UTF-8"), (2, "__base__"), (3, "1024 bytes"), (4, "in row 0 too"), (0, "hash")):
        assert any(f"row {row} (" in line and words in line for line in said), (row, words, said)
    assert "row 1 (no readable name)" in " ".join(said)
    assert found.total == len(said)


def test_an_index_that_leads_astray(folder):
    path = names_file(folder)
    whole = load_file(path)
    save_file({**whole, "hashes": whole["hashes"].flip(0)}, path)
    assert "ascending order" in str(verify_bank(folder).problems)
    save_file({**whole, "rows": torch.zeros_like(whole["rows"])}, path)
    assert "every row once" in str(verify_bank(folder).problems)
    ends = whole["ends"].clone()
    ends[1] = 99
    save_file({**whole, "ends": ends}, path)
    said = [str(problem) for problem in verify_bank(folder).problems]
    assert any("row 1 (no readable name): expected a name, found the bytes 3 to 99" in line for line in said)


def test_files_that_do_not_belong_together(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "num_profiles": 4}))
    (problem,) = verify_bank(folder).problems
    assert "num_profiles=5" in problem.text


def test_a_bank_that_cannot_be_opened_has_one_problem(folder):
    (folder / MODEL).write_bytes((folder / MODEL).read_bytes()[:-3])
    found = verify_bank(folder)
    assert (found.profiles, found.total) == (None, 1)
    assert "not a readable safetensors file" in found.problems[0].text
    with pytest.raises(ConfigError, match="neither a folder here"):
        verify_bank(folder / "nowhere")


def test_all_problems_are_counted_and_the_first_are_told(many_profiles, tmp_path):
    ProfileBank.from_model(many_profiles(num_profiles=50)).save_pretrained(tmp_path)
    rewrite(tmp_path / MODEL, lambda tensors: tensors[BITS].zero_())
    found = verify_bank(tmp_path)
    assert found.total == 50
    assert [problem.row for problem in found.problems] == list(range(20))
