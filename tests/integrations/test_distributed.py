"""Two real processes with gloo, started by ``accelerate launch``, against one process on the same global batches."""

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from launching import in_two_processes
from peft import PeftModel
from safetensors.torch import load_file

from peft_xmask.integrations.trainer import STATE_FILE

SCRIPT = Path(__file__).with_name("two_processes.py")
ADAPTER = "adapter_model.safetensors"

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch is built without gloo",
)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("two_processes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    """What two processes did together: a folder for each, with the trained tensors of each run."""
    folder = tmp_path_factory.mktemp("together")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        in_two_processes(SCRIPT, folder),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
def alone(script, tmp_path_factory):
    """Runs the same in one process, each run once."""
    done = {}

    def run(config: str):
        if config not in done:
            folder = tmp_path_factory.mktemp("alone")
            done[config] = script.train(config, folder), folder
        return done[config]

    return run


def of_rank(together: Path, rank: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(together / f"rank{rank}" / f"{name}.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_there_were_two_processes_that_spoke_gloo(together):
    for rank in (0, 1):
        facts = json.loads((together / f"rank{rank}" / "facts.json").read_text())
        assert (facts["backend"], facts["processes"]) == ("gloo", 2)


@pytest.mark.parametrize(
    "name", ["hard", "soft", "bottleneck", "masked", "over weights", "accumulated", "hard, over a LoRA"]
)
def test_two_processes_train_what_one_does(name, together, alone, script):
    """Each process started from other random masks: DDP sends those of the first."""
    config = "hard" if name == "accumulated" else name
    model, folder = alone(config)
    expected, found = script.trained(model), of_rank(together, 0, name)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-4, msg=key)
    again = PeftModel.from_pretrained(script.base(config), together / "rank0" / name)
    torch.testing.assert_close(script.logits(again), script.logits(model), atol=1e-5, rtol=1e-4)
    if config.startswith("hard"):
        first, second = (load_file(place / ADAPTER) for place in (folder, together / "rank0" / name))
        assert torch.equal(first[script.BITS], second[script.BITS])


@pytest.mark.parametrize(
    "name",
    [
        "hard",
        "soft",
        "bottleneck",
        "masked",
        "over weights",
        "accumulated",
        "resumed",
        "static-hard",
        "static-noisy",
        "static-masked",
        "static-over weights",
        "hard, over a LoRA",
        "static-hard, over a LoRA",
    ],
)
def test_both_processes_hold_the_same(name, together):
    """Also with Gumbel noise, of which each draws its own: gradients are averaged, masks stay one."""
    assert same(of_rank(together, 0, name), of_rank(together, 1, name))


def test_a_resumed_run_ends_as_the_whole_one(together):
    assert same(of_rank(together, 0, "resumed"), of_rank(together, 0, "hard"))


def test_only_the_first_process_writes(together):
    """The second has a folder of its own: what it would have written is not there."""
    wanted = {"hard", "soft", "bottleneck", "masked", "over weights", "accumulated", "resumed", "hard, over a LoRA"}
    for rank, expected in ((0, wanted), (1, set())):
        folder = together / f"rank{rank}"
        assert {path.parent.name for path in folder.glob(f"*/{ADAPTER}")} == expected
        checkpoints = {path.parent.name for path in folder.glob(f"*/*/{ADAPTER}")}
        assert checkpoints == ({"checkpoint-3", "checkpoint-6"} if expected else set())
        states = {path.parents[1].name for path in folder.glob(f"*/*/{STATE_FILE}")}
        assert states == expected - {"bottleneck", "masked", "over weights"}
    assert not list(together.rglob("*.tmp"))


@pytest.mark.parametrize("config", ["hard", "bottleneck", "masked", "over weights", "hard, over a LoRA"])
def test_a_static_graph_without_a_search_for_unused_parameters(config, together, script):
    """Each process starts from other values, and DDP sends those of the first: not those in the base's parameters."""
    found = of_rank(together, 0, f"static-{config}")
    alone = script.manual_steps(script.adapted(config), 0, 1)
    torch.testing.assert_close(found["logits"], script.logits(alone), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", ["masked", "over weights"])
def test_what_is_written_in_place_leaves_the_base_of_each_process_bit_for_bit(config, together, script):
    """Its head is trained whole and so not the base's; what reads the adapted layers is."""
    expected = script.logits(script.base())
    for rank in (0, 1):
        assert torch.equal(of_rank(together, rank, f"static-{config}")["of the base"], expected)


def test_ddp_does_not_send_the_pool(together, script):
    pool = sum(b.nbytes for name, b in script.adapted("hard").named_buffers() if ".pool." in name)
    assert of_rank(together, 0, "static-hard")["bytes sent a pass"] < 1000 < pool


@pytest.mark.parametrize("config", ["hard", "bottleneck"])
def test_fsdp2_trains_what_one_process_does_and_saves_it_whole(config, together, script):
    start = script.adapted(config)
    found = of_rank(together, 0, f"sharded-{config}")
    assert same(found, of_rank(together, 1, f"sharded-{config}"))
    assert torch.equal(found["start"], script.logits(start))
    alone = script.manual_steps(start, 0, 1)
    torch.testing.assert_close(found["logits"], script.logits(alone), atol=1e-5, rtol=1e-4)
    again = PeftModel.from_pretrained(script.base(), together / f"sharded-{config}" / "whole")
    torch.testing.assert_close(script.logits(again), found["logits"], atol=1e-6, rtol=1e-5)

    alone.save_pretrained(together / f"alone-{config}")
    form = [
        {name: (tensor.dtype, tensor.shape) for name, tensor in load_file(folder / ADAPTER).items()}
        for folder in (together / f"alone-{config}", together / f"sharded-{config}" / "whole")
    ]
    assert form[0] == form[1]


def test_masks_sharded_by_fsdp2_are_gathered_for_files(together, script):
    """For PEFT's own state dict, and for the callback's training state, which is put back into the shards."""
    found = of_rank(together, 0, "sharded-hard")
    file = load_file(together / "sharded-hard" / "whole" / ADAPTER)
    assert torch.equal(found["bits"], file[script.BITS])
    torch.testing.assert_close(found["restored"], found["logits"], atol=1e-6, rtol=1e-5)
    state = load_file(together / "sharded-hard" / "checkpoint-4" / STATE_FILE)
    assert state["default.logits"].shape == (1, 2 * 3 * 20)


@pytest.mark.parametrize("config", ["hard", "bottleneck"])
def test_fsdp1_trains_what_one_process_does(config, together, script):
    found = of_rank(together, 0, f"fsdp1-{config}")
    assert same(found, of_rank(together, 1, f"fsdp1-{config}"))
    start = script.adapted(config)
    assert torch.equal(found["start"], script.logits(start))
    alone = script.manual_steps(start, 0, 1)
    torch.testing.assert_close(found["logits"], script.logits(alone), atol=1e-5, rtol=1e-4)
    again = PeftModel.from_pretrained(script.base(), together / f"fsdp1-{config}")
    torch.testing.assert_close(script.logits(again), found["logits"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("config", ["masked", "over weights"])
def test_methods_that_write_into_the_base_refuse_a_sharded_one(config, together):
    for rank in (0, 1):
        said = json.loads((together / f"rank{rank}" / "facts.json").read_text())["refused"][config]
        assert "sharded over" in said["FSDP1"]
        assert "sharded over" in said["FSDP2"]
