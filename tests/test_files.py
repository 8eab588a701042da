import os
import signal
import subprocess
import sys

import pytest
import torch

from peft_xmask.core.files import (
    dtype_from_name,
    read_tensors,
    sha256_of_file,
    write_atomically,
    write_tensors,
    write_text,
)
from peft_xmask.errors import FileFormatError


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")

    def fail(beside):
        beside.write_text("half of the n")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


KILLED = """
import os, signal, sys
from pathlib import Path
from peft_xmask.core.files import write_atomically
def write(beside):
    beside.write_text("half of the n")
    os.kill(os.getpid(), signal.SIGKILL)
write_atomically(Path(sys.argv[1]), write)
"""


def test_a_killed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_tensors_and_notes_come_back(tmp_path):
    tensors = {"a": torch.arange(6).view(2, 3).t(), "b": torch.randn(2).bfloat16()}
    write_tensors(tmp_path / "t.safetensors", tensors, {"step": "3"})
    found, notes = read_tensors(tmp_path / "t.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert notes == {"format": "pt", "step": "3"}
    assert len(sha256_of_file(tmp_path / "t.safetensors")) == 64


@pytest.mark.parametrize("data", [b"", b"short", b"\xff" * 8 + b"{}", b"\x02" + b"\0" * 7 + b"[]"])
def test_what_is_not_safetensors_is_refused(tmp_path, data):
    path = tmp_path / "t.safetensors"
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match=rf"\({len(data)} bytes\) is not a readable safetensors file"):
        read_tensors(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileFormatError, match="found none"):
        read_tensors(tmp_path / "nothing.safetensors")


def test_storage_dtypes_have_names():
    assert dtype_from_name("bfloat16") is torch.bfloat16
    with pytest.raises(FileFormatError, match="found 'float64'"):
        dtype_from_name("float64")
