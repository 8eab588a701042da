"""A linear adapter as a stock LoRA, loaded where this package is not."""

import copy
import subprocess
import sys

import pytest
import torch
from peft import convert_to_lora, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from peft_xmask import BottleneckConfig, MagnitudeMaskConfig, WeightAdapterConfig, XPEFTConfig, export_lora
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


def test_exported_profiles_are_hotswapped(tiny_bert, tiny_batch, tmp_path):
    """One LoRA stays in the model; its numbers become those of another profile."""
    from peft import PeftModel
    from peft.utils.hotswap import hotswap_adapter

    outputs = {}
    for seed, name in enumerate(("ann", "bob")):
        model = get_peft_model(tiny_bert(), CONFIGS["parallel"]()).eval()
        torch.manual_seed(seed)
        shake(model)
        export_lora(model, tmp_path / name)
        with torch.no_grad():
            outputs[name] = model(**tiny_batch).logits
    assert (outputs["ann"] - outputs["bob"]).abs().max() > 1e-3
    served = PeftModel.from_pretrained(tiny_bert(), tmp_path / "ann").eval()
    for name in ("ann", "bob", "ann"):
        hotswap_adapter(served, str(tmp_path / name), adapter_name="default")
        with torch.no_grad():
            torch.testing.assert_close(served(**tiny_batch).logits, outputs[name], atol=1e-5, rtol=1e-5)


DIFFUSERS = """
import sys, torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
folder = sys.argv[1]
unet = UNet2DConditionModel.from_pretrained(folder + "/base").eval()
unet.load_lora_adapter(folder + "/lora", weight_name="adapter_model.safetensors", prefix="base_model.model")
with torch.no_grad():
    save_file({"sample": unet(**load_file(folder + "/batch.safetensors")).sample}, folder + "/out.safetensors")
assert "peft_xmask" not in sys.modules
"""


@pytest.mark.parametrize("form", ["parallel", "sequential"])
def test_diffusers_loads_a_profile_of_a_unet(form, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=8, attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    unet.save_pretrained(tmp_path / "base")
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    config = XPEFTConfig(
        num_adapters=10,
        bottleneck_size=4,
        activation="identity",
        insertion_form=form,
        scale=3.0,
        target_modules=targets,
    )
    batch = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(2, 5, 8),
    }
    save_file(batch, tmp_path / "batch.safetensors")
    with torch.no_grad():
        plain = unet(**batch).sample
    model = get_peft_model(unet, config).eval()
    shake(model)
    with torch.no_grad():
        expected = model(**batch).sample
    export_lora(model, tmp_path / "lora")
    script = tmp_path / "fresh.py"
    script.write_text(DIFFUSERS)
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert any(key.endswith("lora_B.bias") for key in load_file(tmp_path / "lora" / "adapter_model.safetensors")) == (
        form == "sequential"
    )
    found = load_file(tmp_path / "out.safetensors")["sample"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize("decoder", [False, True])
def test_peft_converts_a_linear_adapter_to_lora(decoder, tiny_bert, tiny_batch):
    """PEFT's own conversion: at full rank the LoRA is the adapter, up to rounding."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2)) if decoder else tiny_bert()
    plain = copy.deepcopy(base)
    form = {"activation": "identity", "insertion_form": "parallel", "use_bias": False}
    model = get_peft_model(base, BottleneckConfig(bottleneck_size=4, scale=30.0, **form)).eval()
    shake(model)
    config, tensors = convert_to_lora(model, rank=4)
    converted = get_peft_model(plain, config).eval()
    set_peft_model_state_dict(converted, tensors)
    with torch.no_grad():
        expected = model(**tiny_batch).logits
        torch.testing.assert_close(converted(**tiny_batch).logits, expected, atol=1e-5, rtol=1e-5)
        with converted.disable_adapter():
            assert (converted(**tiny_batch).logits - expected).abs().max() > 1e-3


def test_peft_refuses_to_convert_what_is_not_linear(tiny_bert):
    model = get_peft_model(tiny_bert(), BottleneckConfig(bottleneck_size=4))
    assert not model.base_model.supports_lora_conversion()
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=4)


@pytest.mark.parametrize(
    ("config", "instead"),
    [
        (XPEFTConfig(num_adapters=24, activation="identity"), "export_lora"),
        (MagnitudeMaskConfig(density=0.01), "fold"),
        (WeightAdapterConfig(target="weight"), "fold"),
    ],
    ids=["xpeft", "magnitude mask", "weight adapter"],
)
def test_what_peft_cannot_convert_is_refused_with_the_way_to_go(config, instead, tiny_bert, tiny_batch):
    model = get_peft_model(tiny_bert(), config).eval()
    with torch.no_grad():
        before = model(**tiny_batch).logits
    assert not model.base_model.supports_lora_conversion()
    with pytest.raises(ConfigError, match=f"convert_to_lora cannot convert adapter 'default'.* {instead}"):
        convert_to_lora(model, rank=4)
    with torch.no_grad():
        assert torch.equal(model(**tiny_batch).logits, before)
