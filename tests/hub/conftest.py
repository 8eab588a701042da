"""A Hub on the loopback interface, and real processes that talk to it through the real client."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

HERE = Path(__file__).parent
CLIENT = HERE / "client.py"
ANN = "token-of-ann"
BASE = "sentence-transformers/all-MiniLM-L6-v2"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"hub_{name}", HERE / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """The server. A tiny random encoder stands in for the base model, under its Hub id."""
    server = module("server")
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3,
        max_position_embeddings=32,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    with server.running_hub() as running:
        running.repos[BASE] = server.Repo(private=False)
        running.repos[BASE].commit("main", {path.name: path.read_bytes() for path in folder.iterdir()})
        yield running
        assert not running.unknown, "the client called what the server does not know"


@pytest.fixture(scope="session")
def client(hub) -> Callable[..., str]:
    """Run a Python script in a process of its own whose Hub is the server; what it printed.

    ``HF_ENDPOINT`` and its kin are read when `huggingface_hub` is imported, so a process it must be.
    """

    def run(script: Path, *args: object, home: Path, token: str | None = None, offline: bool = False) -> str:
        dropped = ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "TRANSFORMERS_CACHE")
        env = {name: value for name, value in os.environ.items() if name not in dropped}
        env |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
        env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"}
        env |= ({"HF_TOKEN": token} if token else {}) | ({"HF_HUB_OFFLINE": "1"} if offline else {})
        env["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [env.get("PYTHONPATH")])])
        command = [sys.executable, str(script), *map(str, args)]
        done = subprocess.run(command, env=env, cwd=home, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run


@dataclass
class Loaded:
    outputs: dict[str, torch.Tensor]
    pools: dict[str, list[str]]
    home: Path


@pytest.fixture(scope="session")
def pushed(client, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pushed")
    client(CLIENT, "push", folder, home=tmp_path_factory.mktemp("home-of-ann"), token=ANN)
    return folder


def load(client, home: Path, folder: Path, **how) -> Loaded:
    client(CLIENT, "load", folder, home=home, **how)
    return Loaded(load_file(folder / "found.safetensors"), json.loads((folder / "pools.json").read_text()), home)


@pytest.fixture(scope="session")
def online(pushed, client, tmp_path_factory) -> Loaded:
    return load(client, tmp_path_factory.mktemp("fresh-home"), tmp_path_factory.mktemp("online"), token=ANN)


@pytest.fixture(scope="session")
def offline(online, hub, client, tmp_path_factory) -> Loaded:
    """The second load: without the network and without a token, from the cache of the first."""
    before = len(hub.requests)
    loaded = load(client, online.home, tmp_path_factory.mktemp("offline"), offline=True)
    assert len(hub.requests) == before
    return loaded
