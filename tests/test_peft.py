"""Registration, and the names of PEFT that this package stands on."""

import ast
import importlib
import inspect
import os
import pkgutil
import shutil
import subprocess
import sys
from enum import Enum
from pathlib import Path
from types import GenericAlias, ModuleType

import peft
import pytest
from peft import PeftMixedModel, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import variants
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

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


def our_modules() -> list[ModuleType]:
    """Every module of the tuners."""
    found = pkgutil.walk_packages(peft_xmask.tuners.__path__, "peft_xmask.tuners.")
    return [importlib.import_module(each.name) for each in found]


def our_classes(base: type) -> list[type]:
    """Classes of ours that extend one of PEFT's."""
    everything = (member for module in our_modules() for member in vars(module).values())
    members = (each for each in everything if isinstance(each, type) and not isinstance(each, GenericAlias))
    return sorted({each for each in members if issubclass(each, base) and "peft_xmask" in each.__module__}, key=repr)


HOOKS = {
    BaseTuner: (
        "_cast_adapter_dtype",
        "_check_merge_allowed",
        "_check_target_module_exists",
        "_create_and_replace",
        "_enable_adapter_layers",
        "_get_adapter_state_dict",
        "_inject_parameters",
        "_prepare_adapter_config",
        "_prepare_model",
        "_remap_adapter_state_dict_for_load",
        "_replace_module",
        "_unload_and_optionally_merge",
        "disable_adapter_layers",
        "enable_adapter_layers",
        "inject_adapter",
        "merge_adapter",
        "prefix",
        "set_adapter",
        "supports_lora_conversion",
        "target_module_mapping",
        "tuner_layer_cls",
        "unload",
        "unmerge_adapter",
    ),
    BaseTunerLayer: (
        "_move_adapter_to_device_of_base_layer",
        "adapter_layer_names",
        "bias",
        "delete_adapter",
        "enable_adapters",
        "merge",
        "other_param_names",
        "set_adapter",
        "supports_lora_conversion",
        "unmerge",
        "weight",
    ),
}
"""What PEFT calls or reads, and we override: under another name there, ours would silently not be called any more."""


@pytest.mark.parametrize(("base", "hook"), [(base, hook) for base, hooks in HOOKS.items() for hook in hooks])
def test_peft_still_has_each_hook_that_we_override(base: type, hook: str):
    ours = [vars(each)[hook] for each in our_classes(base) if hook in vars(each)]
    assert ours, f"nobody overrides {hook}: take it off the list"
    assert hook in dir(base) or hook in base.__annotations__
    theirs = inspect.getattr_static(base, hook, None)
    theirs, *ours = (getattr(each, "__func__", each) for each in (theirs, *ours))
    if inspect.isfunction(theirs):
        names = list(inspect.signature(theirs).parameters)
        for each in ours:
            own = inspect.signature(each).parameters.values()
            star = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in own)
            accepted = [parameter.name for parameter in own if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
            assert star or len(accepted) >= len(names), (hook, names, accepted)


def test_the_list_of_hooks_is_complete():
    overridden = {
        (base, name)
        for base in HOOKS
        for each in our_classes(base)
        for name in vars(each)
        if name in dir(base) and name not in dir(nn.Module) and name != "_abc_impl" and not name.startswith("__")
    }
    missing = overridden - {(base, hook) for base, hooks in HOOKS.items() for hook in hooks}
    assert not missing, "add these to HOOKS"


def test_peft_still_has_what_is_looked_up_by_name():
    """Where it is missing we go on without, so nothing else would notice."""
    assert inspect.isfunction(variants.is_alora_relevant_in_batch)
    for method in ("create_or_update_model_card", "_upload_modified_files"):
        assert inspect.isfunction(inspect.getattr_static(PeftModel, method))
    assert "_enable_peft_forward_hooks" in inspect.getsource(PeftModel)
    for method in (PeftMixedModel.__init__, PeftMixedModel.add_adapter):
        assert "_check_config_compatible(peft_config)" in inspect.getsource(method)


def test_private_names_of_peft_are_imported_in_one_file():
    found = set()
    for path in sorted(Path(peft_xmask.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "peft" and not node.level:
                found |= {(path.name, f"{node.module}.{each.name}") for each in node.names if _is_private(node, each)}
    assert {name for name, _ in found} <= {"peft_private.py"}, found


def _is_private(node: ast.ImportFrom, alias: ast.alias) -> bool:
    public = (peft, peft.utils) if node.module in ("peft", "peft.utils") else (peft,)
    return alias.name.startswith("_") or not any(hasattr(module, alias.name) for module in public)


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
