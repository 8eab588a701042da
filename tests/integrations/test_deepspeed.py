"""DeepSpeed's ZeRO-2 and ZeRO-3 on two gloo processes, against one process without it on the same global batches."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

pytest.importorskip(
    "deepspeed", reason="DeepSpeed is not installed: docs/contributing.md says how to", exc_type=ImportError
)
SCRIPT = Path(__file__).with_name("zero_processes.py")
ADAPTER = "adapter_model.safetensors"
READS = ["hard", "soft", "bottleneck"]
IN_PLACE = ["masked", "over weights"]
STAGES = [*((config, 2) for config in READS + IN_PLACE), *((config, 3) for config in READS)]


spec = importlib.util.spec_from_file_location("two_processes", SCRIPT.with_name("two_processes.py"))
assert spec is not None
assert spec.loader is not None
plain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plain)


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    """What two processes did together: a folder for each, with the trained tensors of each run."""
    folder = tmp_path_factory.mktemp("together")
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # ninja, for DeepSpeed's extension
    }
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT), str(folder)]
    done = subprocess.run(
        [sys.executable, *launch], env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
def facts(together) -> list[dict[str, dict[str, str]]]:
    """What each process was told."""
    return [json.loads((together / f"rank{rank}" / "facts.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone():
    """The model that one process trains by hand."""
    return {config: plain.manual_steps(plain.adapted(config), 0, 1) for config in READS + IN_PLACE}


def of_rank(together: Path, rank: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(together / f"rank{rank}" / f"{name}.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("config", "stage"), STAGES)
def test_zero_trains_what_one_process_does(config, stage, together, alone):
    found = of_rank(together, 0, f"{config}-{stage}")
    assert same(found, of_rank(together, 1, f"{config}-{stage}"))
    for name, value in plain.trained(alone[config]).items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4, msg=name)
    torch.testing.assert_close(found["logits"], plain.logits(alone[config]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("config", "stage"), STAGES)
def test_one_process_loads_what_zero_saves(config, stage, together, alone, tmp_path):
    """The file is that of any other run, and a model that is loaded from it saves the same bits."""
    folder = together / f"{config}-{stage}" / "whole"
    again = PeftModel.from_pretrained(plain.base(), folder)
    found = of_rank(together, 0, f"{config}-{stage}")
    torch.testing.assert_close(plain.logits(again), found["logits"], atol=1e-6, rtol=1e-5)
    again.save_pretrained(tmp_path / "again")
    file = load_file(folder / ADAPTER)
    assert same(file, load_file(tmp_path / "again" / ADAPTER))
    alone[config].save_pretrained(tmp_path / "alone")
    form = [
        {name: (tensor.dtype, tensor.shape) for name, tensor in each.items()}
        for each in (file, load_file(tmp_path / "alone" / ADAPTER))
    ]
    assert form[0] == form[1]


@pytest.mark.parametrize("config", READS)
def test_parts_are_not_saved_as_if_they_were_the_whole(config, facts):
    for told in facts:
        assert "GatheredParameters" in told["parts"][f"{config}-3"]
        assert told["parts"][f"{config}-2"] == ""


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("config", ["hard", "bottleneck"])
def test_the_trainer_saves_what_it_trained(config, stage, together, tmp_path):
    """For masks also with another learning rate, for which ``XPEFTCallback`` changes them before the first step."""
    name = f"trainer-{config}-{stage}"
    found = of_rank(together, 0, name)
    assert same(found, of_rank(together, 1, name))
    expected = plain.train(config, tmp_path)
    for key, value in plain.trained(expected).items():
        torch.testing.assert_close(found[key], value, atol=1e-4, rtol=1e-3, msg=key)
    for folder in (together / name, together / name / "checkpoint-6"):
        again = PeftModel.from_pretrained(plain.base(), folder)
        torch.testing.assert_close(plain.logits(again), plain.logits(expected), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_resumed_run_ends_as_the_whole_one(stage, together):
    assert same(of_rank(together, 0, f"resumed-{stage}"), of_rank(together, 0, f"trainer-hard-{stage}"))


@pytest.mark.parametrize("config", IN_PLACE)
def test_methods_that_write_into_the_base_refuse_zero_3(config, facts):
    for told in facts:
        assert "ZeRO-3" in told["refused"][config]
        assert "ZeRO-3" in told["sharded base"][config]


@pytest.mark.parametrize("config", ["hard", "bottleneck"])
def test_a_base_that_is_sharded_while_it_is_loaded(config, together, facts, alone):
    """It has no fingerprint, since no process has its weights."""
    assert [told["sharded base"][config] for told in facts] == ["", ""]
    found = of_rank(together, 0, f"sharded-{config}")["logits"]
    torch.testing.assert_close(found, plain.logits(alone[config]), atol=1e-5, rtol=1e-4)
    folder = together / f"sharded-{config}"
    assert json.loads((folder / "adapter_config.json").read_text())["base_fingerprint"] is None
    torch.testing.assert_close(
        plain.logits(PeftModel.from_pretrained(plain.base(), folder)), found, atol=1e-6, rtol=1e-5
    )
