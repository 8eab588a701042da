"""A bank is checked row by row: what is wrong is named, and nothing that is right."""

import json

import pytest
import torch
from bank_files import MODEL, flip, rewrite, set_names

from peft_xmask.bank.storage import BITS, GAIN_BITS
from peft_xmask.core.adapter_folder import NAMES_PREFIX
from peft_xmask.errors import ConfigError
from peft_xmask.profiles import ProfileBank, verify_bank

CONFIG = "adapter_config.json"


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

    rewrite(folder, change)
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
    rewrite(tmp_path, lambda tensors: tensors[BITS][2, 1, 0].fill_(255))
    (problem,) = verify_bank(tmp_path).problems
    assert problem.row == 2
    assert "up-mask of site 0 with finite logits" in problem.text


def test_names_that_cannot_be(folder):
    rewrite(folder, lambda tensors: set_names(tensors, [b"a", b"\xff\xfe", b"__base__", b"x" * 1025, b"a"]))
    found = verify_bank(folder)
    said = [str(problem) for problem in found.problems]
    for row, words in ((1, "UTF-8"), (2, "__base__"), (3, "1024 bytes"), (4, "in row 0 too"), (0, "hash")):
        assert any(f"row {row} (" in line and words in line for line in said), (row, words, said)
    assert "row 1 (no readable name)" in " ".join(said)
    assert found.total == len(said)


def test_an_index_that_leads_astray(folder):
    whole = {name: tensor.clone() for name, tensor in ProfileBank.from_pretrained(folder).name_index().tensors.items()}

    def changed(**tensors):
        rewrite(folder, lambda found: found.update({NAMES_PREFIX + name: each for name, each in tensors.items()}))
        return [str(problem) for problem in verify_bank(folder).problems]

    assert "ascending order" in str(changed(hashes=whole["hashes"].flip(0)))
    assert "every row once" in str(changed(rows=torch.zeros_like(whole["rows"])))
    ends = whole["ends"].clone()
    ends[1] = 99
    said = changed(**{**whole, "ends": ends})
    assert any("row 1 (no readable name): expected a name, found the bytes 3 to 99" in line for line in said)


def test_a_config_for_peft_that_says_something_else(folder):
    path = folder / CONFIG
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_profiles": 4, "scale": 7.5}))
    first, second = verify_bank(folder).problems
    assert "num_profiles=5" in first.text
    assert "scale=1.0 in adapter_config.json, as the bank says, found 7.5" in second.text
    assert ProfileBank.from_pretrained(folder).config.scale == 1.0
    for content, words in (("{", "is not JSON"), (None, "found none")):
        path.unlink()
        if content is not None:
            path.write_text(content)
        (problem,) = verify_bank(folder).problems
        assert words in problem.text
        assert "PEFT cannot load the folder" in problem.text


@pytest.mark.parametrize("key", [BITS, GAIN_BITS, f"{NAMES_PREFIX}names", "base_model.model.classifier.weight"])
def test_any_flipped_bit_is_found(key, folder):
    flip(folder, key, byte=1)
    assert any("found" in problem.text and "SHA-256" in problem.text for problem in verify_bank(folder).problems)


def test_flipped_bits_that_keep_k_are_found(folder):
    before = ProfileBank.from_pretrained(folder)["ann"]
    bits = int(before.bits[0, 0, 0])
    one, zero = (next(bit for bit in range(8) if bits >> bit & 1 == value) for value in (1, 0))
    flip(folder, byte=0, bits=1 << one | 1 << zero)
    assert ProfileBank.from_pretrained(folder)["ann"] != before  # it opens, and is another mask
    (problem,) = verify_bank(folder).problems
    assert "Bytes changed since the bank was written" in problem.text


def test_a_shared_head_that_is_no_numbers(folder):
    head = "base_model.model.classifier.bias"
    rewrite(folder, lambda tensors: tensors[head].fill_(float("nan")))
    (problem,) = verify_bank(folder).problems
    assert f"finite numbers in the shared tensor '{head}'" in problem.text


def test_deep_verification_loads_pool_and_base(many_profiles, tiny_bert, tmp_path):
    bank = ProfileBank.from_model(many_profiles())
    bank.save_pretrained(tmp_path / "bank")
    assert verify_bank(tmp_path / "bank", deep=True, base=tiny_bert()).total == 0
    other = tiny_bert()
    with torch.no_grad():
        other.bert.encoder.layer[0].output.dense.weight += 1
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    (problem,) = verify_bank(tmp_path / "bank", deep=True, base=other).problems
    assert "base whose adapted weights have fingerprint" in problem.text
    assert other.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    (problem,) = verify_bank(tmp_path / "bank", deep=True).problems
    assert "does not name its base" in problem.text
    (problem,) = verify_bank(tmp_path / "bank", deep=True, base=tmp_path / "nowhere").problems
    assert "nowhere" in problem.text
    bank.config.pool_seed = 9
    bank.save_pretrained(tmp_path / "pool")
    assert verify_bank(tmp_path / "pool").total == 0
    (problem,) = verify_bank(tmp_path / "pool", deep=True, base=tiny_bert()).problems
    assert "Expected a pool with fingerprint" in problem.text
    base = tmp_path / "base"
    tiny_bert().save_pretrained(base)
    bank.config.pool_seed, bank.config.base_model_name_or_path = 0, str(base)
    bank.select([]).save_pretrained(tmp_path / "named")
    assert verify_bank(tmp_path / "named", deep=True).total == 0
    other.save_pretrained(base)
    assert verify_bank(tmp_path / "named", deep=True).total == 1


def test_a_bank_that_cannot_be_opened_has_one_problem(folder):
    (folder / MODEL).write_bytes((folder / MODEL).read_bytes()[:-3])
    found = verify_bank(folder)
    assert (found.profiles, found.total) == (None, 1)
    assert "not a readable safetensors file" in found.problems[0].text
    with pytest.raises(ConfigError, match="neither a folder here"):
        verify_bank(folder / "nowhere")


def test_all_problems_are_counted_and_the_first_are_told(many_profiles, tmp_path):
    ProfileBank.from_model(many_profiles(num_profiles=50)).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors[BITS].zero_())
    found = verify_bank(tmp_path)
    assert found.total == 50
    assert [problem.row for problem in found.problems] == list(range(20))
