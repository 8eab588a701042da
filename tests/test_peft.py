"""Registration, and the names of PEFT that this package stands on."""

import importlib
import inspect
import os
import shutil
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_xmask
from peft_xmask import BottleneckConfig, XPEFTConfig
from peft_xmask.tuners.base import peft_private as _peft


@pytest.mark.parametrize(("name", "config"), [("XPEFT", XPEFTConfig), ("BOTTLENECK_ADAPTER", BottleneckConfig)])
def test_methods_are_registered(name: str, config: type):
    member = PeftType(name)
    assert member is getattr(PeftType, name)
    assert member.value == name
    assert member in list(PeftType)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is config
    assert PEFT_TYPE_TO_PREFIX_MAPPING[name] == f"{name.lower()}_"
    assert PEFT_TYPE_TO_TUNER_MAPPING[name].prefix == f"{name.lower()}_"


def test_registering_again_changes_nothing():
    before = dict(PEFT_TYPE_TO_CONFIG_MAPPING), list(PeftType)
    importlib.reload(sys.modules["peft_xmask.tuners.xpeft.model"])
    assert _peft.register("xpeft", XPEFTConfig, peft_xmask.tuners.xpeft.XPEFTModel)
    assert (dict(PEFT_TYPE_TO_CONFIG_MAPPING), list(PeftType)) == before


def test_a_method_of_someone_else_is_left_alone():
    class Stranger:
        __module__ = "somewhere.else"

    member = _peft.peft_type("STRANGER_METHOD")
    PEFT_TYPE_TO_CONFIG_MAPPING[member] = Stranger
    try:
        with pytest.warns(UserWarning, match="already has a method 'stranger_method' from somewhere.else"):
            assert not _peft.register("stranger_method", XPEFTConfig, object)
        assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is Stranger
    finally:
        del PEFT_TYPE_TO_CONFIG_MAPPING[member]


def test_every_name_taken_from_peft_exists():
    for name in _peft.__all__:
        assert hasattr(_peft, name), name


PROBE = """
import copy, enum, pickle, sys
def add_member(enum, name):
{body}
class Kind(str, enum.Enum):
    A = "A"
first = add_member(Kind, "B")
assert add_member(Kind, "B") is first is Kind.B is Kind("B") is Kind["B"]
assert Kind.B == "B" and isinstance(Kind.B, Kind) and [k.value for k in Kind] == ["A", "B"]
assert copy.deepcopy(first) is first and repr(first) == "<Kind.B: 'B'>" and hash(first) == hash(Kind.B)
print(sys.version_info[:2])
"""


def installed_python(version: str) -> str | None:
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for python in (shutil.which(f"python{version}"), *pyenv.glob(f"{version}.*/bin/python")):
        if python and not subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode:
            return str(python)
    return None


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_a_member_can_be_added_on_every_python(version: str, tmp_path):
    """The enum machinery differs between Pythons; the function is run, alone, by each one that is installed."""
    python = installed_python(version)
    if python is None:
        pytest.skip(f"no Python {version} here")
    body = "".join(inspect.getsourcelines(_peft.add_member)[0][1:])
    path = tmp_path / "probe.py"
    path.write_text(PROBE.replace("{body}", body))
    done = subprocess.run([python, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tuple(map(int, version.split("."))))


def test_the_enum_of_peft_is_still_one_we_can_extend():
    assert issubclass(PeftType, str)
    assert issubclass(PeftType, Enum)
