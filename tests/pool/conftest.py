import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification

from peft_xmask.core.sites import Site

WIDTH, FFN, LAYERS = 16, 32, 2
FFN_OUTPUTS = [f"bert.encoder.layer.{i}.output.dense" for i in range(LAYERS)]


def tiny_bert():
    config = BertConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=FFN,
        vocab_size=30,
        max_position_embeddings=16,
    )
    return BertForSequenceClassification(config)


@pytest.fixture
def make_lora(tmp_path):
    """Save a real LoRA whose two matrices are both random; the PEFT model and the folder."""

    def make(name, *, seed=0, target_modules=r".*layer\.\d+\.output\.dense", **fields):
        torch.manual_seed(seed)
        fields = {"r": 4, "init_lora_weights": False, **fields}
        model = get_peft_model(tiny_bert(), LoraConfig(target_modules=target_modules, **fields))
        folder = tmp_path / name
        model.save_pretrained(folder)
        return model, folder

    return make


@pytest.fixture
def make_bottleneck(tmp_path):
    """Write a bottleneck adapter folder as PEFT saves one; the folder and its tensors by short name."""

    def make(name, *, seed=0, size=4, sites=tuple(FFN_OUTPUTS), bias=True, dtype=torch.float32, **fields):
        generator = torch.Generator().manual_seed(seed)
        shapes = {"down.weight": (size, WIDTH), "up.weight": (WIDTH, size)}
        if bias:
            shapes |= {"down.bias": (size,), "up.bias": (WIDTH,)}
        tensors = {
            f"base_model.model.{site}.bottleneck_adapter_{part}": torch.randn(shape, generator=generator).to(dtype)
            for site in sites
            for part, shape in shapes.items()
        }
        config = {
            "peft_type": "BOTTLENECK_ADAPTER",
            "bottleneck_size": size,
            "activation": "relu",
            "layer_norm": False,
            "insertion_form": "sequential",
            "scale": 1.0,
            "use_bias": bias,
        }
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config | fields))
        save_file(tensors, str(folder / "adapter_model.safetensors"))
        return folder, tensors

    return make


@pytest.fixture
def edit_json():
    """Change fields of a JSON file; a value of ``...`` removes the field."""

    def edit(path: Path, **fields):
        data = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({name: value for name, value in data.items() if value is not ...}))

    return edit


@pytest.fixture
def ffn_sites():
    """Sites as a tuner meets them in the tiny BERT: sequential, so both widths are the output's."""
    return [Site(name, WIDTH, WIDTH) for name in FFN_OUTPUTS]


@pytest.fixture
def golden():
    return Path(__file__).parent / "golden"
