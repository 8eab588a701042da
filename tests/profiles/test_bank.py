"""Banks of profiles: on disk, in memory, and what is refused."""

import hashlib
import json
import subprocess
import sys
import time
from contextlib import contextmanager

import filelock
import numpy as np
import pytest
import torch
from bank_files import MODEL, NAMES, flip, rewrite, set_names
from peft import PeftModel
from safetensors.torch import load_file, save_file

from peft_xmask.bank.storage import BITS, GAIN_BITS, OFFSET_BITS
from peft_xmask.core.adapter_folder import NAMES_PREFIX
from peft_xmask.core.packing import pack_halves
from peft_xmask.errors import (
    BaseMismatchError,
    ConfigError,
    FileFormatError,
    LockedError,
    MaskFormatError,
    PeftXMaskError,
    PoolMismatchError,
)
from peft_xmask.profiles import Profile, ProfileBank, compare_banks, verify_bank


def same(first: ProfileBank, second: ProfileBank) -> bool:
    return list(first) == list(second) and all(first[name] == second[name] for name in first)


def test_a_saved_bank_holds_what_was_saved(bank, tmp_path):
    bank.save_pretrained(tmp_path)
    opened = ProfileBank.from_pretrained(tmp_path)
    assert len(opened) == 5
    assert list(opened) == list(bank) == ["ann", "bob", "Zoë", "ann.b", "张伟"]
    assert "ann" in opened
    assert "an" not in opened
    assert same(opened, bank)
    assert len({opened[name].bits.numpy().tobytes() for name in opened}) == 5
    assert opened["bob"].nbytes == opened.nbytes == 2 * 3 * 3 + 2 * 3
    assert opened["bob"].selected(opened.spec).sum(-1).eq(10).all()
    with pytest.raises(KeyError, match="'nobody' in this bank of 5"):
        opened["nobody"]


def test_the_folder_is_an_ordinary_adapter(bank, many_profiles, tiny_bert, tiny_batch, tmp_path):
    bank.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path).eval()
    model = many_profiles()
    for row in range(5):
        for each in (loaded, model):
            each.set_profile(row)
        with torch.no_grad():
            assert torch.equal(loaded(**tiny_batch).logits, model(**tiny_batch).logits)


def test_an_ordinary_adapter_opens_as_a_bank(many_profiles, tmp_path):
    many_profiles().save_pretrained(tmp_path)
    assert list(ProfileBank.from_pretrained(tmp_path)) == ["0", "1", "2", "3", "4"]


def test_a_bank_of_folders_and_models(single_profile, many_profiles, tiny_bert):
    folders = {"ann": single_profile(1), "bob": single_profile(2)}
    bank = ProfileBank.from_profiles(folders)
    assert list(bank) == ["ann", "bob"]
    model = PeftModel.from_pretrained(tiny_bert(), folders["bob"])
    bank.add("bob's twin", model)
    assert bank["bob"] == bank["bob's twin"] != bank["ann"]
    with pytest.raises(ConfigError, match="one profile, found 5"):
        bank.add("all", many_profiles())


def test_adding_removing_and_saving_over_itself(bank, tmp_path):
    bank.save_pretrained(tmp_path)
    old = ProfileBank.from_pretrained(tmp_path)
    edited = ProfileBank.from_pretrained(tmp_path)
    edited.remove("bob")
    edited.add("carol", old["ann"])
    edited.add("Zoë", old["张伟"])
    edited.remove("ann.b")
    edited.add("ann.b", old["ann.b"])
    assert list(edited) == ["ann", "张伟", "carol", "Zoë", "ann.b"]
    assert len(edited) == 5
    assert "bob" not in edited
    edited.save_pretrained(tmp_path)
    opened = ProfileBank.from_pretrained(tmp_path)
    assert same(opened, edited)
    assert opened["Zoë"] == old["张伟"]
    assert same(old, bank)  # whoever held the old file goes on with it
    for name in ("bob", "nobody"):
        with pytest.raises(KeyError):
            edited.remove(name)


def test_selecting_and_merging(bank, tmp_path):
    some, others = bank.select(["张伟", "ann"]), bank.select(["bob"])
    assert list(some) == ["张伟", "ann"]
    assert some["ann"] == bank["ann"]
    others.save_pretrained(tmp_path / "others")
    merged = ProfileBank.merge([some, tmp_path / "others"], tmp_path / "merged")
    assert list(merged) == ["张伟", "ann", "bob"]
    assert all(merged[name] == bank[name] for name in merged)
    assert json.loads((tmp_path / "merged" / "adapter_config.json").read_text())["num_profiles"] == 3
    with pytest.raises(ConfigError, match=r"'ann' \(and 1 more\) is in both bank 1 of 2 and bank 2 of 2"):
        ProfileBank.merge([some, bank], tmp_path / "clash")
    assert not (tmp_path / "clash" / MODEL).exists()
    assert len(bank.select([])) == 0


def test_a_base_without_the_head_is_refused(bank, tiny_bert):
    class Headless(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = tiny_bert().bert
            self.config = self.bert.config

        def forward(self, input_ids):
            return self.bert(input_ids)[0]

    base = Headless()
    before = list(base.state_dict())
    with pytest.raises(ConfigError, match=r"modules that this base does not have: .*classifier"):
        bank.attach(base)
    assert list(base.state_dict()) == before


def test_what_does_not_belong_is_refused(bank, single_profile, tiny_bert):
    before = list(bank)
    for fields, error, words in (
        ({"pool_seed": 9}, PoolMismatchError, "pool_fingerprint"),
        ({"top_k": 3}, ConfigError, "top_k=3"),
        ({"learn_gain": False}, ConfigError, "learn_gain=False"),
        ({"num_adapters": 24}, PeftXMaskError, "fingerprint"),
    ):
        with pytest.raises(error, match=words):
            bank.add("stranger", single_profile(3, **fields))
    foreign = single_profile(4)
    config = json.loads((foreign / "adapter_config.json").read_text())
    (foreign / "adapter_config.json").write_text(json.dumps({**config, "base_fingerprint": "0" * 16}))
    with pytest.raises(BaseMismatchError, match="base_fingerprint"):
        bank.add("stranger", foreign)
    whole = bank["ann"]
    with pytest.raises(MaskFormatError, match="top_k=10"):
        bank.add("broken", Profile(whole.bits ^ 1, whole.gain_bits))
    with pytest.raises(FileFormatError, match="learn_gain"):
        bank.add("broken", Profile(whole.bits))
    for name in ("", "__base__", "x" * 2000):
        with pytest.raises(ConfigError, match="name"):
            bank.add(name, whole)
    assert list(bank) == before


def test_another_head_is_refused(bank, single_profile):
    folder = single_profile(5)
    tensors = load_file(folder / MODEL)
    head = next(key for key in tensors if "classifier" in key)
    tensors[head] = tensors[head] + 1
    save_file(tensors, folder / MODEL, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="head"):
        bank.add("own head", folder)


DAMAGE = {
    "truncated": lambda folder: (folder / MODEL).write_bytes((folder / MODEL).read_bytes()[:-3]),
    "oversized": lambda folder: (folder / MODEL).write_bytes((folder / MODEL).read_bytes() + b"x"),
    "no file": lambda folder: (folder / MODEL).unlink(),
    "fewer names than rows": lambda folder: rewrite(folder, lambda tensors: set_names(tensors, [b"ann", b"bob"])),
    "no names": lambda folder: rewrite(folder, lambda tensors: tensors.pop(f"{NAMES_PREFIX}ends")),
    "another method": lambda folder: rewrite(folder, bank_config='{"peft_type": "LORA"}'),
    "a config that is no JSON": lambda folder: rewrite(folder, bank_config="{"),
    "a config that is a list": lambda folder: rewrite(folder, bank_config="[]"),
    "a later version": lambda folder: rewrite(folder, bank_version="3"),
    "names elsewhere": lambda folder: rewrite(folder, bank_version="1", bank_names="../profiles-0.safetensors"),
    "a header that was edited": lambda folder: edit(folder, b'top_k\\": 10', b'top_k\\": 11'),
    "a checksum that was edited": lambda folder: edit(folder, b'"bank_data_sha256":"', b'"bank_data_sha257":"'),
}


def edit(folder, old: bytes, new: bytes) -> None:
    content = (folder / MODEL).read_bytes()
    assert content.count(old) == 1
    (folder / MODEL).write_bytes(content.replace(old, new))


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_refused_in_words(kind, bank, tmp_path):
    bank.save_pretrained(tmp_path)
    DAMAGE[kind](tmp_path)
    with pytest.raises(FileFormatError, match=r"Expected|not a readable|is not JSON"):
        ProfileBank.from_pretrained(tmp_path)


def test_a_flipped_bit_is_found_when_its_profile_is_used(bank, tmp_path):
    bank.save_pretrained(tmp_path)
    flip(tmp_path, byte=2 * 3 * 3)
    opened = ProfileBank.from_pretrained(tmp_path)
    assert opened["ann"] == bank["ann"]
    with pytest.raises(MaskFormatError, match="exactly top_k=10"):
        opened["bob"]


def test_the_file_is_laid_out_as_the_specification_says(bank, tmp_path):
    bank.save_pretrained(tmp_path)
    content = (tmp_path / MODEL).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    entries = json.loads(header)
    facts = entries["__metadata__"]
    assert length % 8 == 0
    assert (facts["format"], facts["bank_version"]) == ("pt", "2")
    assert json.loads(facts["bank_config"]) == json.loads((tmp_path / "adapter_config.json").read_text())
    assert facts["bank_data_sha256"] == hashlib.sha256(data).hexdigest()
    zeroed = header.replace(facts["bank_header_sha256"].encode(), b"0" * 64)
    assert facts["bank_header_sha256"] == hashlib.sha256(zeroed).hexdigest()
    assert list(entries)[-2:] == [BITS, GAIN_BITS]
    assert entries[BITS]["shape"] == [5, 2, 3, 3]
    start, end = entries[BITS]["data_offsets"]
    assert data[start:end] == b"".join(bank[name].bits.numpy().tobytes() for name in bank)
    assert entries[GAIN_BITS]["data_offsets"][1] == len(data)
    start, end = entries["profile_names.names"]["data_offsets"]
    assert data[start:end] == "annbobZoëann.b张伟".encode()
    assert load_file(tmp_path / MODEL).keys() == entries.keys() - {"__metadata__"}  # any safetensors reader


def test_an_emptied_bank_saves_and_opens_again(bank, tmp_path):
    bank.save_pretrained(tmp_path)
    opened = ProfileBank.from_pretrained(tmp_path)
    for name in list(opened):
        opened.remove(name)
    opened.save_pretrained(tmp_path)
    empty = ProfileBank.from_pretrained(tmp_path)
    assert (len(empty), list(empty), empty.nbytes) == (0, [], bank.nbytes)
    assert verify_bank(tmp_path).total == 0
    empty.add("ann", bank["ann"])
    empty.save_pretrained(tmp_path)
    assert ProfileBank.from_pretrained(tmp_path)["ann"] == bank["ann"]


def test_names_may_be_whole_numbers(many_profiles, tmp_path):
    bank = ProfileBank.from_model(many_profiles(), [7, 42, np.int64(3), "x", 0])
    assert list(bank) == ["7", "42", "3", "x", "0"]
    assert 42 in bank
    assert bank[42] == bank["42"]
    bank.add(8, bank[7])
    bank.remove(7)
    bank.rename("x", 9)
    assert list(bank.select([8, 3, 9])) == ["8", "3", "9"]
    assert 7 not in bank
    for name in (True, 1.5, None):
        with pytest.raises(ConfigError, match="string or a whole number"):
            bank.add(name, bank[8])


def test_renaming(bank):
    old = bank["bob"]
    bank.rename("bob", "robert")
    assert list(bank) == ["ann", "Zoë", "ann.b", "张伟", "robert"]
    assert bank["robert"] == old
    with pytest.raises(ConfigError, match="called 'ann'"):
        bank.rename("robert", "ann")
    with pytest.raises(KeyError, match="'bob'"):
        bank.rename("bob", "x")


@pytest.mark.parametrize("names", ["abcde", b"abcde", 5])
def test_names_that_are_not_a_list_are_refused(names, many_profiles):
    with pytest.raises(ConfigError, match="Expected a list of names"):
        ProfileBank.from_model(many_profiles(), names)


def test_two_writers_are_refused(bank, tmp_path):
    bank.save_pretrained(tmp_path)
    with filelock.FileLock(tmp_path / ".bank.lock"), pytest.raises(LockedError, match="Another process"):
        bank.select(["ann"]).save_pretrained(tmp_path)
    assert len(ProfileBank.from_pretrained(tmp_path)) == 5


WRITER = """
import itertools, os, sys
from pathlib import Path
import peft_xmask.bank.storage as storage
from peft_xmask.profiles import ProfileBank
storage.complete_card = lambda *_: None  # nothing but the bank, as fast as it can be written
os.fsync = lambda handle: None
bank = ProfileBank.from_pretrained(sys.argv[1])
small = bank.select(list(bank)[:2])
for turn in itertools.count():
    (bank, small)[turn % 2].save_pretrained(sys.argv[1])
    if turn == 1:
        print("writing", flush=True)
"""


@contextmanager
def writing(folder, script=WRITER):
    """A process that replaces a bank all the time; it is killed whatever happens in the block."""
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_every_reader_has_one_whole_bank(bank, tmp_path):
    """tests/profiles/open_under_writing.py does this longer and with more readers."""
    bank.save_pretrained(tmp_path)
    first = ProfileBank.from_pretrained(tmp_path)
    with writing(tmp_path):
        seen = set()
        for _ in range(500):
            opened = ProfileBank.from_pretrained(tmp_path)
            seen.add(len(opened))
            assert all(opened[name] == bank[name] for name in opened)
    assert seen == {2, 5}
    assert same(first, bank)  # a reader that holds an old one keeps it


SLOW_WRITER = """
import sys, time
import peft_xmask.core.tensor_file as tensor_file
from peft_xmask.profiles import ProfileBank
in_order = tensor_file._in_order
def slowly(*parts):
    for number, block in enumerate(in_order(*parts)):
        yield block
        if number == 3:
            print("writing", flush=True)
            time.sleep(600)
tensor_file._in_order = slowly
bank = ProfileBank.from_pretrained(sys.argv[1])
bank.add("new", bank["ann"])
bank.save_pretrained(sys.argv[1])
"""


def test_a_writer_that_is_killed_leaves_the_old_bank_and_nothing_for_long(bank, tmp_path):
    bank.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    with writing(tmp_path, SLOW_WRITER):
        half = list(tmp_path.glob(".*.tmp"))
        assert len(half) == 1
        assert same(ProfileBank.from_pretrained(tmp_path), bank)
        with pytest.raises(LockedError):
            bank.save_pretrained(tmp_path)
        assert half[0].exists()  # a living writer's
    assert half[0].exists()
    assert same(ProfileBank.from_pretrained(tmp_path), bank)
    bank.save_pretrained(tmp_path)  # the lock of a killed process is free
    assert {path.name for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("turn", range(3))
def test_a_writer_that_is_killed_anywhere_leaves_a_whole_bank(turn, bank, tmp_path):
    bank.save_pretrained(tmp_path)
    with writing(tmp_path):
        time.sleep(0.05 * turn)
    assert verify_bank(tmp_path).profiles in (2, 5)
    opened = ProfileBank.from_pretrained(tmp_path)
    assert all(opened[name] == bank[name] for name in opened)
    opened.save_pretrained(tmp_path)
    assert not list(tmp_path.glob(".*.tmp"))
    assert verify_bank(tmp_path).total == 0


def test_offsets_travel_with_their_profiles(many_profiles, tmp_path):
    plain = ProfileBank.from_model(many_profiles(), NAMES)
    halves = torch.arange(10, dtype=torch.float16).view(5, 2) - 3
    content = plain.content()
    bank = ProfileBank(plain.config, content.bits, content.gain_bits, NAMES, content.shared, pack_halves(halves))
    assert (bank.nbytes, bank.offset_count) == (plain.nbytes + 4, 2)
    bank.save_pretrained(tmp_path / "bank")
    opened = ProfileBank.from_pretrained(tmp_path / "bank")
    assert same(opened, bank)
    assert opened["bob"].offsets.tolist() == [-1, 0]
    opened.remove("ann")
    opened.add("eve", bank["张伟"])
    merged = ProfileBank.merge([opened.select(["eve", "bob"]), bank.select(["ann"])], tmp_path / "merged")
    assert [merged[name].offsets.tolist() for name in merged] == [[5, 6], [-1, 0], [-3, -2]]
    with pytest.raises(FileFormatError, match="offsets for 2 outputs, found None"):
        bank.add("none", plain["ann"])
    with pytest.raises(ConfigError, match="offsets for None outputs"):
        ProfileBank.merge([plain.select(["bob"]), merged], tmp_path / "mixed")
    changed = Profile(*bank["bob"].parts[:2], pack_halves(torch.tensor([0.5, 0.0])))
    edited = ProfileBank.from_pretrained(tmp_path / "bank")
    edited.add("bob", changed)
    (change,) = compare_banks(bank, edited).changed
    assert (change.name, change.bits, change.gains, change.offsets) == ("bob", 0, 0, 1)
    rewrite(tmp_path / "bank", lambda tensors: tensors[OFFSET_BITS][2].fill_(255))
    (problem,) = verify_bank(tmp_path / "bank").problems
    assert "offset of output 0" in str(problem)
    with pytest.raises(MaskFormatError, match="finite offsets"):
        ProfileBank.from_pretrained(tmp_path / "bank")["Zoë"]
