"""A saved profile through every door, on the real MiniLM and on tiny models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from peft_xmask import BottleneckConfig, XPEFTConfig, profile_size

KINDS = {
    "hard": XPEFTConfig(task_type="SEQ_CLS"),
    "soft": XPEFTConfig(task_type="SEQ_CLS", mask_type="soft"),
    "gain": XPEFTConfig(task_type="SEQ_CLS", learn_gain=True, insertion_form="parallel", activation="gelu"),
    "bottleneck": BottleneckConfig(task_type="SEQ_CLS", init_weights=False, layer_norm=True),
}


def output(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


def train_a_little(model: torch.nn.Module, batch: dict[str, torch.Tensor], steps: int = 3, lr: float = 1e-3) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    labels = torch.arange(len(batch["input_ids"])) % 3
    for _ in range(steps):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", KINDS)
def test_every_door_gives_the_same_logits(kind, minilm_classifier, minilm_batch, tmp_path):
    from dataclasses import replace

    model = get_peft_model(minilm_classifier(), replace(KINDS[kind]))
    start = output(model, minilm_batch)
    train_a_little(model, minilm_batch)
    trained = output(model, minilm_batch)
    assert not torch.equal(trained, start)
    model.save_pretrained(tmp_path)

    assert torch.equal(output(PeftModel.from_pretrained(minilm_classifier(), tmp_path), minilm_batch), trained)
    lean = PeftModel.from_pretrained(minilm_classifier(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(output(lean, minilm_batch), trained)
    auto = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    assert torch.equal(output(auto, minilm_batch), trained)
    native = minilm_classifier()
    report = native.load_adapter(str(tmp_path))
    assert not report.missing_keys
    assert not report.unexpected_keys
    assert torch.equal(output(native, minilm_batch), trained)


FRESH = """
import sys, torch, peft_xmask
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
base, folder, batch, out = sys.argv[1:]
torch.manual_seed(1)
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=5)
model = PeftModel.from_pretrained(model, folder).eval()
from safetensors.torch import load_file, save_file
with torch.no_grad():
    save_file({"logits": model(**load_file(batch)).logits}, out)
"""


def test_a_fresh_process_gives_the_same_logits(minilm, minilm_classifier, minilm_batch, tmp_path):
    from safetensors.torch import save_file

    model = get_peft_model(minilm_classifier(), XPEFTConfig(task_type="SEQ_CLS"))
    train_a_little(model, minilm_batch)
    model.save_pretrained(tmp_path / "profile")
    save_file(minilm_batch, tmp_path / "batch.safetensors")
    script = tmp_path / "fresh.py"
    script.write_text(FRESH)
    args = [
        str(minilm),
        str(tmp_path / "profile"),
        str(tmp_path / "batch.safetensors"),
        str(tmp_path / "out.safetensors"),
    ]
    done = subprocess.run([sys.executable, str(script), *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(tmp_path / "out.safetensors")["logits"], output(model, minilm_batch))


def test_evaluating_while_training_equals_the_reloaded_file(tiny_bert, tiny_batch, tmp_path):
    config = XPEFTConfig(task_type="SEQ_CLS", num_adapters=20, bottleneck_size=4, learn_gain=True)
    model = get_peft_model(tiny_bert(), config)
    for step in range(4):
        train_a_little(model, tiny_batch, steps=1, lr=1e-2)
        now = output(model, tiny_batch)
        model.save_pretrained(tmp_path / str(step))
        assert torch.equal(output(PeftModel.from_pretrained(tiny_bert(), tmp_path / str(step)), tiny_batch), now)


@pytest.mark.parametrize("mask_type", ["hard", "soft"])
def test_loading_for_training_chooses_the_same_adapters_and_says_so_once(
    mask_type, tiny_bert, tiny_batch, tmp_path, recwarn
):
    config = XPEFTConfig(task_type="SEQ_CLS", num_adapters=20, bottleneck_size=4, mask_type=mask_type, learn_gain=True)
    model = get_peft_model(tiny_bert(), config)
    train_a_little(model, tiny_batch, lr=1e-2)
    model.save_pretrained(tmp_path / "first")
    again = PeftModel.from_pretrained(tiny_bert(), tmp_path / "first", is_trainable=True)
    assert torch.equal(output(again, tiny_batch), output(model, tiny_batch))
    again.save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    recwarn.clear()
    train_a_little(again, tiny_batch, steps=2)
    assert len([w for w in recwarn if "training state is not in the file" in str(w.message)]) == 1
    assert not torch.equal(output(again, tiny_batch), output(model, tiny_batch))


def test_transformers_own_loading_for_training(tiny_bert, tiny_batch, tmp_path):
    config = XPEFTConfig(task_type="SEQ_CLS", num_adapters=20, bottleneck_size=4, learn_gain=True)
    model = get_peft_model(tiny_bert(), config)
    train_a_little(model, tiny_batch, lr=1e-2)
    model.save_pretrained(tmp_path)
    native = tiny_bert()
    native.load_adapter(str(tmp_path), is_trainable=True)
    assert torch.equal(output(native, tiny_batch), output(model, tiny_batch))
    with pytest.warns(UserWarning, match="training state is not in the file"):
        train_a_little(native, tiny_batch, steps=3, lr=1e-2)
    assert not torch.equal(output(native, tiny_batch), output(model, tiny_batch))


def test_transformers_own_saving(tiny_bert, tiny_batch, tmp_path):
    native = tiny_bert()
    native.add_adapter(XPEFTConfig(num_adapters=20, bottleneck_size=4))
    expected = output(native, tiny_batch)
    native.save_pretrained(tmp_path)
    again = tiny_bert()
    again.load_adapter(str(tmp_path))
    assert torch.equal(output(again, tiny_batch), expected)
    again.disable_adapters()
    assert torch.equal(output(again, tiny_batch), output(tiny_bert(), tiny_batch))


def test_the_file_is_as_small_as_promised(tmp_path):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    base = BertModel(
        BertConfig(vocab_size=50, hidden_size=16, num_attention_heads=2, intermediate_size=24)
    )  # 12 blocks
    for learn_gain, payload, limit in ((False, 312, 480), (True, 336, 640)):
        model = get_peft_model(base, XPEFTConfig(num_adapters=100, bottleneck_size=4, learn_gain=learn_gain))
        model.save_pretrained(tmp_path)
        size = profile_size(tmp_path)
        assert size.payload_bytes == payload
        assert size.head_bytes == 0
        assert size.file_bytes <= limit
        assert size.folder_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
        assert profile_size(model).file_bytes == size.file_bytes
        base = model.unload()


def test_only_bytes_are_saved(tiny_bert, tmp_path):
    model = get_peft_model(tiny_bert(), XPEFTConfig(num_adapters=20, bottleneck_size=4, learn_gain=True))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} == {
        "base_model.model.mask_table.xpeft_bits.weight": ((1, 2, 3, 3), torch.uint8),
        "base_model.model.mask_table.xpeft_gain_bits.weight": ((1, 3, 2), torch.uint8),
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["pool_fingerprint"] == model.peft_config["default"].pool_fingerprint
    assert config["base_fingerprint"] is not None
    assert config["top_k"] == 10


def test_a_cast_model_keeps_its_bytes(tiny_bert, tmp_path):
    model = get_peft_model(tiny_bert(), XPEFTConfig(num_adapters=20, bottleneck_size=4, learn_gain=True))
    model.save_pretrained(tmp_path / "plain")
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path / "plain").to(torch.bfloat16)
    loaded.save_pretrained(tmp_path / "cast")
    plain, cast = (load_file(Path(tmp_path) / name / "adapter_model.safetensors") for name in ("plain", "cast"))
    assert all(torch.equal(plain[key], cast[key]) for key in plain)


def test_a_base_in_another_dtype_is_accepted(tiny_bert, tiny_batch, tmp_path):
    model = get_peft_model(tiny_bert(), XPEFTConfig(num_adapters=20, bottleneck_size=4))
    model.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        low = PeftModel.from_pretrained(tiny_bert().to(dtype), tmp_path)
        out = output(low, tiny_batch)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), output(model, tiny_batch), atol=0.02, rtol=0.05)
