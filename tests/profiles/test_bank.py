"""Banks of profiles: on disk, in memory, and what is refused."""

import json
import subprocess
import sys
import time

import filelock
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, safe_open, save_file

from peft_xmask.bank.storage import BITS, GAIN_BITS
from peft_xmask.errors import (
    BaseMismatchError,
    ConfigError,
    FileFormatError,
    LockedError,
    MaskFormatError,
    PeftXMaskError,
    PoolMismatchError,
)
from peft_xmask.profiles import Profile, ProfileBank

MODEL = "adapter_model.safetensors"


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
    assert len(list(tmp_path.glob("profiles-*.safetensors"))) == 1
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
    with pytest.raises(ConfigError, match="'ann' for rows"):
        ProfileBank.merge([some, bank], tmp_path / "clash")
    assert not (tmp_path / "clash" / MODEL).exists()
    assert len(bank.select([])) == 0


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
    "truncated masks": lambda folder: (folder / MODEL).write_bytes((folder / MODEL).read_bytes()[:-3]),
    "oversized masks": lambda folder: (folder / MODEL).write_bytes((folder / MODEL).read_bytes() + b"x"),
    "no masks": lambda folder: (folder / MODEL).unlink(),
    "truncated names": lambda folder: names_file(folder).write_bytes(names_file(folder).read_bytes()[:-1]),
    "no names": lambda folder: names_file(folder).unlink(),
    "names of another bank": lambda folder: (
        ProfileBank.from_pretrained(folder).select(["ann"]).save_pretrained(folder / "other")
        or names_file(folder).write_bytes(names_file(folder / "other").read_bytes())
    ),
    "another method": lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}'),
    "a config that is no JSON": lambda folder: (folder / "adapter_config.json").write_text("{"),
    "no config": lambda folder: (folder / "adapter_config.json").unlink(),
    "names elsewhere": lambda folder: rename_names(folder, "../profiles-0.safetensors"),
    "a later version": lambda folder: rename_names(folder, None),
}


def names_file(folder):
    return next(folder.glob("profiles-*.safetensors"))


def rename_names(folder, name: str | None) -> None:
    with safe_open(str(folder / MODEL), framework="pt") as opened:
        metadata = dict(opened.metadata())
        tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118
    metadata.update({"bank_version": "2"} if name is None else {"bank_names": name})
    save_file(tensors, folder / MODEL, metadata=metadata)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_refused_in_words(kind, bank, tmp_path):
    bank.save_pretrained(tmp_path)
    DAMAGE[kind](tmp_path)
    with pytest.raises(FileFormatError, match=r"Expected|not a readable|is not JSON"):
        ProfileBank.from_pretrained(tmp_path)


def test_a_flipped_bit_is_found_when_its_profile_is_used(bank, tmp_path):
    bank.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / MODEL)
    tensors[BITS][1, 0, 0, 0] ^= 1
    with safe_open(str(tmp_path / MODEL), framework="pt") as opened:
        metadata = dict(opened.metadata())
    save_file(tensors, tmp_path / MODEL, metadata=metadata)
    opened = ProfileBank.from_pretrained(tmp_path)
    assert opened["ann"] == bank["ann"]
    with pytest.raises(MaskFormatError, match="exactly top_k=10"):
        opened["bob"]


def test_the_file_is_laid_out_as_the_specification_says(bank, tmp_path):
    bank.save_pretrained(tmp_path)
    content = (tmp_path / MODEL).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert header["__metadata__"] == {
        "format": "pt", "bank_version": "1", "bank_names": names_file(tmp_path).name,
    }  # fmt: skip
    keys = [key for key in header if key != "__metadata__"]
    assert keys[-2:] == [BITS, GAIN_BITS]
    assert header[BITS]["shape"] == [5, 2, 3, 3]
    start, end = header[BITS]["data_offsets"]
    assert content[8 + length + start : 8 + length + end] == b"".join(
        bank[name].bits.numpy().tobytes() for name in bank
    )
    assert header[GAIN_BITS]["data_offsets"][1] + 8 + length == len(content)


def test_two_writers_are_refused(bank, tmp_path):
    bank.save_pretrained(tmp_path)
    with filelock.FileLock(tmp_path / ".bank.lock"), pytest.raises(LockedError, match="Another process"):
        bank.select(["ann"]).save_pretrained(tmp_path)
    assert len(ProfileBank.from_pretrained(tmp_path)) == 5


REPLACER = """
import itertools, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
for turn in itertools.count(1):
    os.link(folder / f"{turn % 2}.safetensors", folder / "next")
    os.replace(folder / "next", folder / "adapter_model.safetensors")
    time.sleep(0.002)
"""


def test_header_and_tensors_are_those_of_one_file(bank, tmp_path):
    """safetensors opens a path twice: two banks, each with the right names beside it, take turns in between."""
    longer = tmp_path / "longer"
    bank.save_pretrained(tmp_path)
    edited = ProfileBank.from_pretrained(tmp_path)
    edited.add("eve", bank["bob"])
    edited.save_pretrained(longer)
    names_file(longer).rename(tmp_path / names_file(longer).name)
    (tmp_path / "0.safetensors").hardlink_to(tmp_path / MODEL)
    (tmp_path / "1.safetensors").hardlink_to(longer / MODEL)
    with subprocess.Popen([sys.executable, "-c", REPLACER, str(tmp_path)]) as replacer:
        try:
            seen = set()
            for _ in range(500):
                opened = ProfileBank.from_pretrained(tmp_path)
                seen.add(len(opened))
                assert all(opened[name] == bank[name] for name in bank)
        finally:
            replacer.kill()
    assert seen == {5, 6}


WRITER = """
import sys
from peft_xmask.profiles import ProfileBank
bank = ProfileBank.from_pretrained(sys.argv[1])
for turn in range(10_000):
    bank.add(f"new {turn}", bank["ann"])
    bank.save_pretrained(sys.argv[1])
"""


def test_a_writer_that_is_killed_leaves_a_whole_bank(bank, tmp_path):
    """While it writes, readers always find one bank or the next."""
    bank.save_pretrained(tmp_path)
    for _ in range(2):
        count = len(ProfileBank.from_pretrained(tmp_path))
        with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)]) as writer:
            deadline = time.monotonic() + 120
            seen: set[int] = set()
            while len(seen) < 5 and time.monotonic() < deadline and writer.poll() is None:
                opened = ProfileBank.from_pretrained(tmp_path)
                seen.add(len(opened))
                assert opened["ann"] == bank["ann"]
            writer.kill()
        after = ProfileBank.from_pretrained(tmp_path)
        assert len(seen) == 5
        assert len(after) > count
        assert all(after[name] == bank["ann"] for name in after if name.startswith("new"))
    after.save_pretrained(tmp_path)  # the lock of a killed process is free
    assert len(list(tmp_path.glob("profiles-*.safetensors"))) == 1
