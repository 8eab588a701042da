"""A linear adapter as a stock LoRA, loaded where this package is not."""

import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from peft_xmask import BottleneckConfig, XPEFTConfig, export_lora
from peft_xmask.errors import ConfigError, MergeError

FRESH = """
import sys, torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import {cls}
folder, batch, out = sys.argv[1:]
model = {cls}.from_pretrained(folder + "/base")
model = PeftModel.from_pretrained(model, folder + "/lora").eval()
with torch.no_grad():
    save_file({{"logits": model(**load_file(batch)).logits}}, out)
assert "peft_xmask" not in sys.modules
"""


def elsewhere(cls: str, folder, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the exported LoRA from an interpreter that never imports this package."""
    save_file(batch, folder / "batch.safetensors")
    script = folder / "fresh.py"
    script.write_text(FRESH.format(cls=cls))
    args = [str(folder), str(folder / "batch.safetensors"), str(folder / "out.safetensors")]
    done = subprocess.run([sys.executable, str(script), *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "out.safetensors")["logits"]


def shake(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


CONFIGS = {
    "sequential": lambda: XPEFTConfig(num_adapters=10, bottleneck_size=4, activation="identity", scale=1.0),
    "parallel": lambda: XPEFTConfig(
        num_adapters=10, bottleneck_size=4, activation="identity", insertion_form="parallel", scale=1.0
    ),
    "bottleneck": lambda: BottleneckConfig(bottleneck_size=4, activation="identity", scale=0.5),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("decoder", [False, True])
def test_a_stock_lora_gives_the_same_outputs(kind, decoder, tiny_bert, tiny_batch, tmp_path):
    config = CONFIGS[kind]()
    if decoder:
        torch.manual_seed(0)
        base = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2))
        config.task_type = "CAUSAL_LM"
    else:
        base = tiny_bert()
        config.task_type = "SEQ_CLS"
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, config).eval()
    shake(model)
    export_lora(model, tmp_path / "lora")
    with torch.no_grad():
        expected = model(**tiny_batch).logits
    found = elsewhere(type(base).__name__, tmp_path, tiny_batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad(), model.disable_adapter():
        assert (found - model(**tiny_batch).logits).abs().max() > 1e-3


def test_what_is_not_linear_is_refused_and_nothing_is_written(tiny_bert, tmp_path):
    model = get_peft_model(tiny_bert(), XPEFTConfig(num_adapters=10, bottleneck_size=4))
    with pytest.raises(MergeError, match=r"Cannot export 'bert\.encoder"):
        export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    with pytest.raises(ConfigError, match="named 'nobody'"):
        export_lora(model, tmp_path / "lora", "nobody")
