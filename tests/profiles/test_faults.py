"""Hostile and damaged files, and disks that fill up: refused in words, and the old bank stays."""

import errno
import hashlib
import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from bank_files import rewrite
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from peft_xmask.bank import storage
from peft_xmask.bank.storage import BITS
from peft_xmask.errors import FileFormatError, PeftXMaskError
from peft_xmask.profiles import ProfileBank, verify_bank

MODEL, CONFIG = "adapter_model.safetensors", "adapter_config.json"
fuzzed = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@pytest.fixture
def folder(bank, tmp_path):
    bank.save_pretrained(tmp_path / "bank")
    return tmp_path / "bank"


def files_of(folder) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".json", ".safetensors")
    }


def use(where) -> None:
    """What users do with a bank, and what a checker does: an error of ours, or an answer."""
    with suppress(PeftXMaskError, KeyError):
        bank = ProfileBank.from_pretrained(where)
        for name in bank:
            assert bank[name].selected(bank.spec).sum(-1).eq(bank.spec.top_k).all()
        bank.similar("ann", 3)
        bank.select(["ann", "Zoë"])
    found = verify_bank(where)
    assert found.total >= len(found.problems)


damage = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "cut", "insert", "swap"]),
        st.floats(0, 1),
        st.integers(0, 255),
        st.binary(max_size=12),
    ),
    min_size=1,
    max_size=4,
)


def damaged(content: bytes, steps) -> bytes:
    data = bytearray(content)
    for kind, place, number, some in steps:
        at = int(place * max(0, len(data) - 1))
        if not data:
            break
        if kind == "flip":
            data[at] ^= 1 << number % 8
        elif kind == "set":
            data[at] = number
        elif kind == "cut":
            del data[at : at + 1 + number]
        elif kind == "insert":
            data[at:at] = some
        else:
            data[at:], data[:at] = data[: len(data) - at], data[len(data) - at :]
    return bytes(data)


@fuzzed
@given(st.integers(0, 1), damage)
def test_any_damage_to_any_file_is_refused_or_harmless(folder, which, steps):
    whole = files_of(folder)
    name = list(whole)[which]
    (folder / name).write_bytes(damaged(whole[name], steps))
    try:
        use(folder)
    finally:
        for each, content in whole.items():
            (folder / each).write_bytes(content)


def with_header(content: bytes, change) -> bytes:
    """Another header, with its checksum: what does not fit must be refused for what it is."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    header["__metadata__"].update(bank_header_sha256="0" * 64)
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256(encoded).hexdigest().encode()
    encoded = encoded.replace(b"0" * 64, digest, 1)
    return len(encoded).to_bytes(8, "little") + encoded + content[8 + length :]


def entry(**fields):
    return lambda header: header[BITS].update(fields)


HEADERS = {
    "overlapping tensors": entry(data_offsets=[0, 90]),
    "a hole": entry(data_offsets=[8, 98]),
    "beyond the end": entry(data_offsets=[1 << 40, (1 << 40) + 90]),
    "backwards": entry(data_offsets=[90, 0]),
    "negative": entry(data_offsets=[-90, 0]),
    "another shape than bytes": entry(shape=[6, 2, 3, 3]),
    "a shape that overflows": entry(shape=[1 << 62, 1 << 62, 4, 1]),
    "a negative shape": entry(shape=[-5, 2, 3, -3]),
    "no shape": entry(shape=[]),
    "another dtype": entry(dtype="I8"),
    "an unknown dtype": entry(dtype="EVIL"),
    "five dimensions": entry(shape=[5, 2, 3, 3, 1]),
    "three masks": entry(shape=[5, 3, 2, 3]),
    "fewer sites": entry(shape=[5, 2, 1, 9]),
    "no profiles": lambda header: header.pop(BITS),
    "no version": lambda header: header["__metadata__"].pop("bank_version"),
    "names in a file, as version 1 has": lambda header: header["__metadata__"].update(
        bank_version="1", bank_names="../../profiles-0.safetensors"
    ),
    "names from the root": lambda header: header["__metadata__"].update(bank_version="1", bank_names="/profiles-0"),
    "names in this file": lambda header: header["__metadata__"].update(bank_version="1", bank_names=MODEL),
    "metadata of numbers": lambda header: header["__metadata__"].update(bank_version=1),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_hostile_header_is_refused(kind, folder):
    path = folder / MODEL
    path.write_bytes(with_header(path.read_bytes(), HEADERS[kind]))
    with pytest.raises(FileFormatError, match=r"Expected|not a readable"):
        ProfileBank.from_pretrained(folder)
    assert verify_bank(folder).profiles is None


@pytest.mark.parametrize("length", [0, 7, 1 << 20, 1 << 32, (1 << 63) - 1, (1 << 64) - 1])
def test_an_impossible_header_length_is_refused(length, folder):
    path = folder / MODEL
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(FileFormatError, match="not a readable"):
        ProfileBank.from_pretrained(folder)


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=3,
)
FIELDS = (
    "num_adapters", "bottleneck_size", "mask_type", "top_k", "mask_weighting", "scale", "learn_gain", "pool",
    "pool_seed", "pool_dtype", "num_profiles", "target_modules", "modules_to_save", "activation", "insertion_form",
    "estimator", "temperature", "logit_scale", "gumbel_noise", "base_fingerprint", "pool_fingerprint", "peft_type",
    "task_type",
    "base_model_name_or_path", "auto_mapping", "revision", "surprise",
)  # fmt: skip


@fuzzed
@given(st.sampled_from(FIELDS), anything)
@example("pool", "../../../etc")
@example("pool", "/etc/passwd")
@example("top_k", None)
@example("scale", None)
@example("mask_weighting", None)
@example("num_adapters", 10**6)
@example("peft_type", "LORA")
def test_any_value_of_a_config_is_refused_or_harmless(folder, field, value):
    path = folder / MODEL
    whole = path.read_bytes()
    rewrite(folder, bank_config=json.dumps({**json.loads((folder / CONFIG).read_text()), field: value}))
    try:
        use(folder)
    finally:
        path.unlink()  # it may be mapped
        path.write_bytes(whole)


@contextmanager
def largest_file(size: int):
    """No file of this process may grow beyond this, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def more(folder) -> ProfileBank:
    edited = ProfileBank.from_pretrained(folder)
    for number in range(3):
        edited.add(f"new {number}", edited["ann"])
    return edited


@pytest.mark.parametrize("size", [0, 10, 500, 2000])  # the header does not fit, or the rows do not
def test_a_write_that_finds_no_room_leaves_the_old_bank(size, folder):
    before, edited = files_of(folder), more(folder)
    with largest_file(size), pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
        edited.save_pretrained(folder)
    after = files_of(folder)
    assert {name: after[name] for name in before} == before
    assert not list(folder.glob(".*.tmp"))
    assert verify_bank(folder).total == 0
    edited.save_pretrained(folder)
    assert len(ProfileBank.from_pretrained(folder)) == 8


def test_no_room_for_the_config_after_the_bank(folder, monkeypatch):
    """The bank is the new one; only what PEFT reads beside it is still that of the old one."""
    edited = ProfileBank.from_pretrained(folder).select(["bob"])

    def full(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(storage, "write_text", full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        edited.save_pretrained(folder)
    monkeypatch.undo()
    assert list(ProfileBank.from_pretrained(folder)) == ["bob"]
    assert ["num_profiles=1" in problem.text for problem in verify_bank(folder).problems] == [True]
    ProfileBank.from_pretrained(folder).save_pretrained(folder)
    assert verify_bank(folder).total == 0


FULL_DISK = """
import sys
from peft_xmask.profiles import ProfileBank
bank = ProfileBank.from_pretrained(sys.argv[1])
for number in range(1000):
    bank.add(f"new {number}", bank["ann"])
try:
    bank.save_pretrained(sys.argv[1])
except OSError as error:
    print(error.errno)
print(len(ProfileBank.from_pretrained(sys.argv[1])))
"""


def test_a_disk_that_is_full(folder, tmp_path):
    """A file system of 64 kB in memory, mounted where only this test sees it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size=64k full "{disk}" && cp -r "{folder}" "{disk}/bank"'
    unshare = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, mount], capture_output=True, check=False).returncode
    ):
        pytest.skip("this system lets no test mount a file system")
    run = f'{mount} && exec "$0" -c "$1" "$2"'
    done = subprocess.run(
        [*unshare, run, sys.executable, FULL_DISK, str(disk / "bank")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(errno.ENOSPC), "5"]


def test_guided_fuzzing_finds_nothing():
    """A little of tests/profiles/fuzz_banks.py."""
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed")
    script = Path(__file__).with_name("fuzz_banks.py")
    done = subprocess.run(
        [sys.executable, str(script), "-atheris_runs=1500", "-seed=1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done 1500" in done.stderr
