"""A pytest plugin for PEFT's own suites: our rows in their tables, local models, and the outcomes in a file."""

import importlib.machinery
import importlib.util
import json
import os
import sys
import types
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from methods import METHODS, Method

TASKS = {
    "test_decoder_models": "CAUSAL_LM",
    "test_encoder_decoder_models": "SEQ_2_SEQ_LM",
    "test_feature_extraction_models": "FEATURE_EXTRACTION",
    "test_seq_classifier": "SEQ_CLS",
}
TARGETS = {"MLP one": ("MLP", ["lin0"]), "MLP two": ("MLP", ["lin0", "lin1"]), "Conv1D": ("EmbConv1D", ["conv1d"])}
OURS = {method.config_cls for method in METHODS}


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


def changing_outputs(config_cls: type, fields: dict[str, Any]) -> dict[str, Any]:
    """In place of PEFT's function of this purpose: an X-PEFT adapter changes the outputs from the start anyway."""
    return {**fields, "init_weights": False} if "init_weights" in config_cls.__dataclass_fields__ else dict(fields)


def suite_fields(method: Method) -> dict[str, Any]:
    """A method's fields, starting at the base model where it can: PEFT's suites ask for the other start themselves."""
    return {**method.fields, "init_weights": True} if "init_weights" in method.fields else method.fields


@contextmanager
def offline(model_id: str) -> Any:
    """In place of PEFT's context manager that goes online for a model's first use."""
    yield


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Replace the rows of the suites' tables by ours, in place: the tests' marks hold the same lists."""
    module = metafunc.module
    if hasattr(module, "OURS_ARE_IN"):
        return
    module.OURS_ARE_IN = True
    name = module.__name__.rpartition(".")[2]
    if name in TASKS:
        module.ALL_CONFIGS[:] = [
            pytest.param(
                row.config_cls, {**suite_fields(row), "task_type": TASKS[name], "target_modules": None}, id=row.name
            )
            for row in METHODS
        ]
    elif name == "test_custom_models":
        module.TEST_CASES[:] = [
            pytest.param(f"{row.name} {place}", model, row.config_cls, {**suite_fields(row), "target_modules": targets})
            for row in METHODS
            for place, (model, targets) in TARGETS.items()
        ]
        module.ALL_PEFT_CONFIG_CLASSES[:] = sorted(OURS, key=lambda cls: cls.__name__)
        module.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = [
            (f"{row.name} {word}", row.name, row.config_cls, *({**row.fields, "target_modules": [t]} for t in targets))
            for row in METHODS
            for word, targets in (("same", ["lin0", "lin0"]), ("different", ["lin0", "lin1"]))
        ]
        module.MIXED_ADAPTER_TEST_CASES[:] = [
            (row.name, *(row.config(target_modules=["lin0"]) for _ in range(2))) for row in METHODS
        ]
    for helper in ("_skip_if_conv1d_not_supported", "_skip_if_not_conv1d_supported"):
        for holder in (module, sys.modules["tests.testing_common"]):
            if hasattr(holder, helper):
                setattr(holder, helper, lambda *args: None)  # we adapt Conv1D


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of our rows."""
    ours = [item for item in items if is_ours(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(ours)])
    items[:] = ours


def is_ours(item: pytest.Item) -> bool:
    values = getattr(item, "callspec", None)
    return values is not None and any(
        (value if isinstance(value, type) else type(value)) in OURS for value in values.params.values()
    )


@pytest.fixture(autouse=True)
def mixed_batches_are_supported(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's suites skip mixed batches for all but some classes, by name: here ours take the place of one of them."""
    if "mixed_adapter_batches" in request.node.name and "config_cls" in request.node.callspec.params:
        monkeypatch.setattr("tests.testing_common.LoraConfig", request.node.callspec.params["config_cls"])


@pytest.fixture(autouse=True)
def the_base_is_the_same(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests load onto another random base, which our fingerprints refuse on purpose: give them the same one."""
    if request.node.name.startswith("test_loading_model"):
        made = request.module.DeepMLP

        def seeded(**fields: Any) -> Any:
            torch.manual_seed(0)
            return made(**fields)

        monkeypatch.setattr(request.module, "DeepMLP", seeded)


OUTCOMES: dict[str, list[str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One outcome for each test, with the error of a failure: the worst of its phases."""
    if report.failed:
        OUTCOMES[report.nodeid] = ["failed", report.longreprtext.strip()]
    elif report.skipped:
        OUTCOMES.setdefault(report.nodeid, ["skipped", ""])
    elif report.when == "call":
        OUTCOMES.setdefault(report.nodeid, ["passed", ""])


def pytest_sessionfinish() -> None:
    """Write the outcomes where the script looks for them."""
    Path(os.environ["PEFT_SUITES_OUTCOMES"]).write_text(json.dumps(OUTCOMES), encoding="utf-8")
