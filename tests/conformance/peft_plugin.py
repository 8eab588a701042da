"""A pytest plugin for PEFT's own suites: our rows in their tables, local models, and the outcomes in a file."""

import importlib.machinery
import importlib.util
import json
import os
import re
import sys
import types
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from methods import METHODS, Method
from peft import LoraConfig
from tiny_models import MODELS

TASKS = {
    "test_decoder_models": "CAUSAL_LM",
    "test_encoder_decoder_models": "SEQ_2_SEQ_LM",
    "test_feature_extraction_models": "FEATURE_EXTRACTION",
    "test_seq_classifier": "SEQ_CLS",
}
TARGETS = {"MLP one": ("MLP", ["lin0"]), "MLP two": ("MLP", ["lin0", "lin1"]), "Conv1D": ("EmbConv1D", ["conv1d"])}
"""Our rows of the custom suite: its models, and what is adapted there."""
CLASSES = sorted({method.config_cls for method in METHODS}, key=lambda cls: cls.__name__)

FREE_TABLES = (
    "test_adapter_name_makes_no_difference",
    "test_mixed_adapter_batches_different_target_layers",
    "test_mixed_adapter_batches_lora_wrong_adapter_name_raises",
    "test_mixed_adapter_batches_multiple_modules_to_save",
    "test_mixed_adapter_batches_partly_overlapping_target_layers",
    "test_mixed_adapter_batches_unsupported_layer_raises",
    "test_multiple_adapters_mixed_modules_to_save",
    "test_multiple_adapters_mixed_modules_to_save_order_switched",
)
"""Tests of the custom suite about every method, whose table of configs has no name: ours take the place of LoRA's."""

SKIPS = ("_skip_if_conv1d_not_supported", "_skip_if_not_conv1d_supported", "check_beft_config")
"""Functions that skip tests for models that others cannot adapt (Conv1D) or have no bias (BEFT, for any method)."""


def pytest_configure(config: pytest.Config) -> None:
    """Before the suites are imported: stand in for diffusers, which they import and our cases do not use."""
    if importlib.util.find_spec("diffusers") is None:
        stand_in = types.ModuleType("diffusers")
        stand_in.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
        stand_in.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
        sys.modules["diffusers"] = stand_in
    sys.path.insert(0, str(config.rootpath))
    from tests import testing_utils

    testing_utils.hub_online_once = offline
    testing_utils.set_init_weights_false = changing_outputs


@contextmanager
def offline(model_id: str) -> Any:
    """In place of PEFT's context manager that goes online for a model's first use."""
    yield


def changing_outputs(config_cls: type, fields: dict[str, Any]) -> dict[str, Any]:
    """In place of PEFT's function of this purpose: a method without ``init_weights`` changes the outputs anyway."""
    return {**fields, "init_weights": False} if "init_weights" in config_cls.__dataclass_fields__ else dict(fields)


def strong(method: Method) -> dict[str, Any]:
    """A method's fields in the suites of transformers, starting at the base model where it can."""
    return at_base({**method.fields, **method.strong})


def mild(method: Method, model: str = "MLP") -> dict[str, Any]:
    """A method's fields in the custom suite, changing the outputs from the start. The Conv1D model learns slowly."""
    return {**method.fields, **(method.mild if model == "MLP" else {})}


def at_base(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields for an adapter that does not change the outputs yet, where the method can."""
    return {**fields, "init_weights": True} if "init_weights" in fields else fields


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Replace the rows of the suites' tables by ours, in place: the tests' marks hold the same lists."""
    module = metafunc.module
    if not hasattr(module, "OURS_ARE_IN"):
        module.OURS_ARE_IN = True
        enter(module, module.__name__.rpartition(".")[2])
    if metafunc.function.__name__ in FREE_TABLES:
        mark = next(metafunc.definition.iter_markers("parametrize"))
        mixing = "mixed_adapter" in metafunc.function.__name__
        mark.args[1][:] = in_place_of_lora(
            mark.args[1], [each for each in METHODS if each.supports_mixed_batch or not mixing]
        )


def enter(module: Any, name: str) -> None:
    """Put our rows into the tables of a suite."""
    if name in TASKS:
        module.ALL_CONFIGS[:] = [
            pytest.param(
                row.config_cls, {**strong(row), "task_type": TASKS[name], "target_modules": None}, id=f"({row.name})"
            )
            for row in METHODS
        ]
    elif name == "test_custom_models":
        missing = [test for test in FREE_TABLES if test not in Path(module.__file__).read_text(encoding="utf-8")]
        if missing:
            raise pytest.UsageError(f"FREE_TABLES of peft_plugin.py names tests that PEFT no longer has: {missing}")
        module.TEST_CASES[:] = [
            pytest.param(
                label, model, row.config_cls, {**at_base(mild(row, model)), "target_modules": targets}, id=label
            )
            for row in METHODS
            for place, (model, targets) in TARGETS.items()
            for label in [f"({row.name}) {place}"]
        ]
        module.ALL_PEFT_CONFIG_CLASSES[:] = [pytest.param(cls, id=f"({cls.__name__})") for cls in CLASSES]
        module.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = [
            pytest.param(
                label, row.name, row.config_cls, *({**mild(row), "target_modules": [t]} for t in targets), id=label
            )
            for row in METHODS
            for word, targets in (("same", ["lin0", "lin0"]), ("different", ["lin0", "lin1"]))
            for label in [f"({row.name}) {word}"]
        ]
        module.MIXED_ADAPTER_TEST_CASES[:] = [
            pytest.param(
                row.name, *(as_ours(LoraConfig(target_modules=["lin0"]), row) for _ in range(2)), id=f"({row.name})"
            )
            for row in METHODS
            if row.supports_mixed_batch
        ]
    for helper in SKIPS:
        for holder in (module, sys.modules["tests.testing_common"]):
            if hasattr(holder, helper):
                setattr(holder, helper, lambda *args: None)


def in_place_of_lora(rows: list[Any], methods: list[Method]) -> list[Any]:
    """The row about LoRA, once for each of our methods."""
    rows = [row if isinstance(row, tuple) else (row,) for row in rows]
    pattern = next(row for row in rows if any(value is LoraConfig or isinstance(value, LoraConfig) for value in row))
    return [pytest.param(*(as_ours(value, each) for value in pattern), id=f"({each.name})") for each in methods]


def as_ours(value: Any, method: Method) -> Any:
    """A method's config, or its maker, for LoRA's; anything else as it is."""
    if value is LoraConfig:
        return partial(method.config_cls, **mild(method))
    if isinstance(value, LoraConfig):
        places = {"target_modules": value.target_modules, "modules_to_save": value.modules_to_save}
        return method.config_cls(**mild(method), **places)
    return value


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of our rows, and refuse a model that has no stand-in."""
    ours = [item for item in items if label_of(item)]
    unknown = {item.callspec.params.get("model_id", "") for item in ours} - set(MODELS)
    if absent := sorted(name for name in unknown if "/" in name):
        raise pytest.UsageError(f"tiny_models.py has no stand-in for: {', '.join(absent)}")
    config.hook.pytest_deselected(items=[item for item in items if not label_of(item)])
    items[:] = ours


def label_of(item: pytest.Item) -> str | None:
    """The name of our row, or of our config class, that a test is about."""
    labels = [method.name for method in METHODS] + [cls.__name__ for cls in CLASSES]
    found = re.search(r"\(([\w-]+)\)", item.callspec.id) if hasattr(item, "callspec") else None
    return found[1] if found and found[1] in labels else None


@pytest.fixture(autouse=True)
def the_same_each_time() -> None:
    """Most of the suites' tests start from whatever random state the one before left."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def like_the_methods_they_name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The suites choose between their checks by class. Where ours is of the same kind, it takes that class's place.

    LoRA can be mixed in a batch. The whole state of a prompt encoder differs after loading, so what is saved is
    compared. PaRa, a variant of DEFT, changes the outputs from the start, so a disabled adapter is compared with the
    base model.
    """
    label, name = label_of(request.node), request.node.originalname
    method = next((each for each in METHODS if each.name == label), None)
    if method is None:
        return
    common, suite = sys.modules["tests.testing_common"], request.module
    if method.supports_mixed_batch and re.fullmatch(r"test_(generate_with_)?mixed_adapter_batches", name):
        for module in (common, suite):
            monkeypatch.setattr(module, "LoraConfig", method.config_cls)
    if method.packed and name.startswith("test_save_pretrained"):
        monkeypatch.setattr(common, "PromptEncoderConfig", method.config_cls)
    if not method.starts_at_base and re.fullmatch(r"test_disable_adapters(_with_merging)?", name):
        monkeypatch.setattr(suite, "DeftConfig", method.config_cls)
        monkeypatch.setattr(method.config_cls, "para", True, raising=False)


@pytest.fixture(autouse=True)
def the_base_is_the_same(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests load onto another random base, which our fingerprints refuse on purpose: give them the same one."""
    if request.node.originalname.startswith("test_loading_model"):
        made = request.module.DeepMLP

        def seeded(**fields: Any) -> Any:
            with torch.random.fork_rng():  # adapters must go on to differ
                torch.manual_seed(0)
                return made(**fields)

        monkeypatch.setattr(request.module, "DeepMLP", seeded)


OUTCOMES: dict[str, dict[str, str]] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """One outcome for each test, the worst of its phases, with the traceback's last entry or the reason of a skip."""
    report = yield
    known = OUTCOMES.setdefault(item.nodeid, {"what": "passed", "method": label_of(item), "test": item.originalname})
    if report.failed:
        entries = getattr(getattr(report.longrepr, "reprtraceback", None), "reprentries", [report.longreprtext])
        known.update(what="failed", error=str(entries[-1]).strip(), traceback=report.longreprtext)
    elif report.skipped and known["what"] == "passed":
        known.update(what="skipped", error=report.longrepr[2])
    return report


def pytest_sessionfinish() -> None:
    """Write the outcomes where the script looks for them."""
    Path(os.environ["PEFT_SUITES_OUTCOMES"]).write_text(json.dumps(OUTCOMES), encoding="utf-8")
