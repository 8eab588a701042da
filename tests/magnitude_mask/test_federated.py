"""The federated example runs as it stands, in Flower's own simulation, and its average is exact."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from masked_models import values_of
from peft import PeftModel
from safetensors.torch import load_file

from peft_xmask.cli.classify import TextClassifier

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "federated.py"


@pytest.fixture(scope="module")
def run(minilm, tmp_path_factory) -> tuple[str, Path]:
    """What a short run prints, and the folder of what it keeps."""
    pytest.importorskip("flwr", reason='Flower is not installed: pip install "peft_xmask[federated]"')
    pytest.importorskip("ray", reason='Flower\'s simulation is not installed: pip install "peft_xmask[federated]"')
    folder = tmp_path_factory.mktemp("federated")
    options = ["--rounds", "2", "--local-steps", "8", "--test-texts", "200", "--out", str(folder / "out")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *options], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, folder / "out"


def test_together_they_beat_every_client_alone(run):
    out, _ = run
    rows = dict(re.findall(r"(client \d alone|all together) +[\d,]+ +(0\.\d+)", out))
    together = float(rows.pop("all together"))
    assert len(rows) == 4
    assert together > max(map(float, rows.values()))


def test_the_bytes_that_travel(run):
    out, _ = run
    rows = "magnitude mask, 0.5 %", "LoRA r=8, the same layers", "LoRA r=8, query and value"
    ours, same, fewer = (int(re.search(rf"{row} +([\d,]+)", out)[1].replace(",", "")) for row in rows)
    assert ours == pytest.approx(4 * 0.005 * 10_616_832, rel=0.01)
    assert same > 6 * ours
    assert fewer > ours


def test_the_average_is_that_of_the_adapters(run):
    """Bit for bit, and the head's too: each client's last profile is loaded as an adapter of one model."""
    _, folder = run
    counts = json.loads((folder / "result.json").read_text())["texts"]
    clients = [folder / f"client-{i}" for i in range(1, 5)]
    model = TextClassifier.load(clients[0]).model
    for i, client in enumerate(clients[1:], 2):
        model.load_adapter(str(client), f"client-{i}")
    names = ["default", *(f"client-{i}" for i in range(2, 5))]
    model.base_model.add_weighted_adapter(names, counts, "average")
    together = TextClassifier.load(folder / "together").model
    assert torch.equal(values_of(model, "average"), values_of(together))
    assert not torch.equal(values_of(model), values_of(together))

    files = [load_file(each / "adapter_model.safetensors") for each in (*clients, folder / "together")]
    for name, found in files.pop().items():
        total = sum(count * each[name].double() for count, each in zip(counts, files, strict=True)) / sum(counts)
        torch.testing.assert_close(found, total.float(), rtol=0, atol=1e-7)
    assert isinstance(together, PeftModel)
