"""Adapters on the quantised linear modules of a real language model: the base stays as it is, we add to outputs."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from peft_xmask import BottleneckConfig, MagnitudeMaskConfig, WeightAdapterConfig, XPEFTConfig, as_base
from peft_xmask.errors import BaseMismatchError, MaskMismatchError, MergeError, TargetError
from peft_xmask.integrations import export_lora
from peft_xmask.tuners.magnitude_mask.quantised import dequantised_weight

TEXTS = ["Once upon a time, there was a little girl named Lily.", "Tom and his dog went to the park to play."]
QUANTISATIONS = ["int8", "nf4", "nf4 in bfloat16", "torchao int8"]
CONFIGS = {
    "xpeft": lambda: XPEFTConfig(task_type="CAUSAL_LM", num_adapters=20, bottleneck_size=4, activation="identity"),
    "bottleneck": lambda: BottleneckConfig(
        task_type="CAUSAL_LM", bottleneck_size=4, activation="identity", insertion_form="parallel", use_bias=False
    ),
    "magnitude mask": lambda: MagnitudeMaskConfig(task_type="CAUSAL_LM", target_modules=["down_proj"], density=0.02),
}


@dataclass(frozen=True)
class Base:
    """A way to load the real language model, and the class of the weights that it then has."""

    load: Callable[[], nn.Module]
    weight: str


def quantisation(name: str) -> tuple[Any, dict[str, Any], str]:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if name == "torchao int8":
        pytest.importorskip("torchao", reason="torchao is not installed: pip install peft_xmask[quantised]")
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig()), {}, "Int8Tensor"
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install peft_xmask[quantised]")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True), {}, "Int8Params"
    dtype = torch.bfloat16 if name == "nf4 in bfloat16" else torch.float32
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return config, {"dtype": dtype}, "Params4bit"


def portable(model: nn.Module) -> nn.Module:
    """Keep bitsandbytes from repacking 4-bit weights, which it does in evaluation on CPUs with AVX512-BF16.

    Its kernel for repacked weights wants widths that the small model does not have, and cannot add a trained bias.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.fixture(scope="module", params=QUANTISATIONS)
def base(request, shared_data: Path) -> Base:
    config, kwargs, weight = quantisation(request.param)

    def load() -> nn.Module:
        folder = shared_data / "stories260k-llama"
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu", **kwargs)
        return portable(model).eval()

    return Base(load, weight)


@pytest.fixture(scope="module")
def whole(shared_data: Path) -> Callable[[], nn.Module]:
    """The same model, not quantised."""
    return lambda: AutoModelForCausalLM.from_pretrained(shared_data / "stories260k-llama").eval()


@pytest.fixture(scope="module")
def batch(shared_data: Path) -> dict[str, torch.Tensor]:
    found = AutoTokenizer.from_pretrained(shared_data / "stories260k-llama")(TEXTS, return_tensors="pt", padding=True)
    return {key: found[key] for key in ("input_ids", "attention_mask")}


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


def train(model: nn.Module, batch: dict[str, torch.Tensor], steps: int = 6) -> list[float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def bytes_of_base(model: nn.Module, biases: bool = True) -> list[torch.Tensor]:
    """The stored weights of the base, quantised or not."""
    found = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and (biases or not name.endswith("bias")):
            plain = parameter.detach()
            inner = [getattr(plain, part) for part in ("qdata", "scale") if hasattr(plain, part)]
            found += [(f"{name}{i}", each.clone()) for i, each in enumerate(inner or [plain])]
    return [tensor for _, tensor in sorted(found, key=lambda each: each[0])]


@pytest.mark.parametrize("config", CONFIGS)
def test_an_adapter_on_a_quantised_base(config, base, batch, tmp_path):
    """Trains, goes off without a trace, saves and loads exactly, and refuses to merge before anything is changed."""
    torch.manual_seed(0)
    model = base.load()
    site = model.model.layers[0].mlp.down_proj
    assert type(site.weight).__name__ == base.weight
    of_base = logits(model, batch)

    model = get_peft_model(model, CONFIGS[config]())
    assert model.peft_config["default"].base_fingerprint is None  # the signs of the weights cannot be read
    before = bytes_of_base(model)
    losses = train(model, batch)
    assert sum(losses[-2:]) < sum(losses[:2])
    assert all(torch.equal(a, b) for a, b in zip(before, bytes_of_base(model), strict=True))
    found = logits(model, batch)
    assert not torch.equal(found, of_base)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), of_base)

    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base.load(), tmp_path), batch), found)

    for merge in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(MergeError, match=r"layers\.0\.mlp\.down_proj.*quantised"):
            merge()
    assert torch.equal(logits(model, batch), found)
    assert torch.equal(logits(model.unload(), batch), of_base)


@pytest.mark.parametrize("name", QUANTISATIONS)
def test_biases_of_a_quantised_base_are_adapted(name, minilm, tmp_path):
    """They are not quantised: they are trained, loaded, merged and restored exactly. Weights are refused."""
    config, kwargs, weight = quantisation(name)

    def load() -> nn.Module:
        torch.manual_seed(0)
        model = AutoModel.from_pretrained(minilm, quantization_config=config, device_map="cpu", **kwargs)
        return portable(model).eval()

    def states(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(**batch).last_hidden_state

    batch = AutoTokenizer.from_pretrained(minilm)(TEXTS, return_tensors="pt", padding=True)
    model = load()
    assert type(model.encoder.layer[0].output.dense.weight).__name__ == weight
    of_base = states(model)
    with pytest.raises(TargetError, match=r"quantised.*target=\"bias\""):
        get_peft_model(load(), WeightAdapterConfig(target="weight"))

    model = get_peft_model(model, WeightAdapterConfig())
    before = bytes_of_base(model, biases=False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(3):
        model.train()(**batch).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(before, bytes_of_base(model, biases=False), strict=True))
    found = states(model)
    assert not torch.equal(found, of_base)
    with model.disable_adapter():
        assert torch.equal(states(model), of_base)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(), tmp_path)
    assert torch.equal(states(loaded), found)
    assert torch.equal(states(loaded.unload()), of_base)
    merged = PeftModel.from_pretrained(load(), tmp_path).merge_and_unload(safe_merge=True)
    assert torch.equal(states(merged), found)


def test_after_peft_has_prepared_the_base_for_training(base, batch):
    """``prepare_model_for_kbit_training`` casts what is not quantised to float32 and turns on checkpointing."""
    torch.manual_seed(0)
    model = get_peft_model(prepare_model_for_kbit_training(base.load()), CONFIGS["xpeft"]())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    losses = train(model, batch)
    assert sum(losses[-2:]) < sum(losses[:2])


def test_only_a_parallel_adapter_can_be_exported(base, batch, tmp_path):
    """A sequential one reads W x, and the numbers of W are not at hand."""
    torch.manual_seed(0)
    model = get_peft_model(base.load(), CONFIGS["bottleneck"]())
    train(model, batch, steps=2)
    export_lora(model, tmp_path / "parallel")
    lora = PeftModel.from_pretrained(base.load(), tmp_path / "parallel")
    torch.testing.assert_close(logits(lora, batch), logits(model, batch), atol=1e-4, rtol=1e-4)
    with pytest.raises(MergeError, match="quantised"):
        export_lora(get_peft_model(base.load(), CONFIGS["xpeft"]()), tmp_path / "sequential")
    assert not (tmp_path / "sequential").exists()


def test_a_profile_moves_between_the_whole_and_the_quantised_base(base, whole, batch, tmp_path):
    """Loads both ways. Only the whole base has a fingerprint, so a check needs it on both sides."""
    torch.manual_seed(0)
    there = get_peft_model(whole(), CONFIGS["xpeft"]())
    train(there, batch)
    fingerprint = there.peft_config["default"].base_fingerprint
    there.save_pretrained(tmp_path / "of the whole")
    served = PeftModel.from_pretrained(base.load(), tmp_path / "of the whole")
    assert served.peft_config["default"].base_fingerprint == fingerprint
    with served.disable_adapter():
        plain = logits(served, batch)
    assert not torch.equal(logits(served, batch), plain)
    served.save_pretrained(tmp_path / "passed on")
    back = PeftModel.from_pretrained(whole(), tmp_path / "passed on")
    assert torch.equal(logits(back, batch), logits(there, batch))

    here = get_peft_model(base.load(), CONFIGS["xpeft"]())
    here.save_pretrained(tmp_path / "of the quantised")
    moved = PeftModel.from_pretrained(whole(), tmp_path / "of the quantised")
    assert moved.peft_config["default"].base_fingerprint == fingerprint


@pytest.mark.parametrize("config", ["xpeft", "bottleneck"])
def test_an_adapter_over_a_lora_of_a_quantised_base(config, base, batch, tmp_path):
    """Masks over a frozen QLoRA, which is known by its own fingerprint: such a base has none."""
    torch.manual_seed(0)
    qlora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.1)
    trained = get_peft_model(base.load(), qlora)
    train(trained, batch)
    trained.save_pretrained(tmp_path / "lora")

    def load() -> PeftModel:
        return PeftModel.from_pretrained(base.load(), tmp_path / "lora", adapter_name="task")

    of_lora = logits(load(), batch)
    assert not torch.equal(of_lora, logits(base.load(), batch))
    model = get_peft_model(as_base(load()), CONFIGS[config]())
    before = bytes_of_base(model)
    losses = train(model, batch)
    assert sum(losses[-2:]) < sum(losses[:2])
    assert all(torch.equal(a, b) for a, b in zip(before, bytes_of_base(model), strict=True))
    found = logits(model, batch)
    assert not torch.equal(found, of_lora)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), of_lora)
    model.set_lora([])
    assert not torch.equal(logits(model, batch), found)
    model.set_lora("task")

    model.save_pretrained(tmp_path / "masks")
    assert model.peft_config["default"].base_fingerprint.startswith("+")
    assert torch.equal(logits(PeftModel.from_pretrained(as_base(load()), tmp_path / "masks"), batch), found)
    other = load()
    with torch.no_grad():
        other.base_model.model.model.layers[0].mlp.down_proj.lora_A["task"].weight.neg_()
    for wrong in (base.load(), as_base(other)):
        with pytest.raises(BaseMismatchError, match="LoRA beneath"):
            PeftModel.from_pretrained(wrong, tmp_path / "masks")

    with pytest.raises(MergeError, match=r"with a LoRA beneath|quantised"):
        model.merge_adapter()
    assert torch.equal(logits(model, batch), found)
    assert torch.equal(logits(model.unload(), batch), of_lora)


def masked(**fields) -> MagnitudeMaskConfig:
    fields = {"density": 0.02, "init_weights": False, "target_modules": ["down_proj"], **fields}
    return MagnitudeMaskConfig(task_type="CAUSAL_LM", **fields)


def test_a_mask_is_that_of_the_dequantised_weights(base, whole, batch, tmp_path):
    """Found again on a base quantised likewise; another one, here the whole, is refused."""
    model = get_peft_model(base.load(), masked())
    with pytest.raises(MergeError, match="quantised"):
        model.base_model.model.model.layers[0].mlp.down_proj.merge()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base.load(), tmp_path), batch), logits(model, batch))
    with pytest.raises(MaskMismatchError, match="another base, or its weights were changed"):
        PeftModel.from_pretrained(whole(), tmp_path)


def test_the_sparse_path_adds_what_its_matrix_would(base, batch):
    """Output and gradients, against the same numbers in a matrix; for two adapters of different masks."""
    torch.manual_seed(0)
    model = get_peft_model(base.load(), masked())
    model.add_adapter("second", masked(selection="largest"))
    model.base_model.set_adapter(["default", "second"])
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(3, 5, layer.in_features, dtype=model.dtype, requires_grad=True)
    y = layer(x)
    cotangent = torch.randn_like(y)
    matrix = torch.zeros(layer.out_features, layer.in_features)
    for change in (*layer.changes("default"), *layer.changes("second")):
        matrix.view(-1).index_add_(0, change.indices.index, change.delta.detach())
    matrix.requires_grad_()
    other = x.detach().requires_grad_()
    expected = layer.base_layer(other) + (other.float() @ matrix.t()).to(y.dtype)
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if y.dtype == torch.float32 else {"atol": 5e-2, "rtol": 5e-2}
    torch.testing.assert_close(y, expected, **tolerance)
    y.backward(cotangent)
    expected.backward(cotangent)
    torch.testing.assert_close(x.grad, other.grad, **tolerance)
    values = model.base_model.table.holders
    for name in ("default", "second"):
        (change,) = layer.changes(name)
        found = values[name].weight.grad[: len(change.indices)]
        torch.testing.assert_close(found, matrix.grad.view(-1)[change.indices.index], **tolerance)
    with torch.no_grad():
        mixed = layer(x, adapter_names=["__base__", "default", "second"])
        assert torch.equal(mixed[0], layer.base_layer(x)[0])
    layer.set_adapter("second")
    torch.testing.assert_close(mixed[2], layer(x)[2].detach(), **tolerance)


def test_biases_of_quantised_modules_take_part():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install peft_xmask[quantised]")
    torch.manual_seed(0)
    base = nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4")).to("cpu")
    with torch.no_grad():
        base[0].bias.copy_(torch.randn(64))
    x, own = torch.randn(3, 64), base[0].bias.clone()
    plain = base(x)
    model = get_peft_model(
        base, MagnitudeMaskConfig(target_modules=["0"], include_bias=True, density=1.0, init_weights=False)
    )
    weight, bias = model.base_model.model[0].changes("default")
    expected = plain + x @ weight.delta.view(64, 64).t() + bias.delta
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(base[0].get_base_layer().bias, own)
    model(x).sum().backward()
    grad = model.base_model.table.holders["default"].weight.grad
    torch.testing.assert_close(grad[-64:], torch.full((64,), 3.0))


@pytest.mark.parametrize("scope", ["module", "model"])
def test_a_mask_dequantises_one_weight_at_a_time(scope, base, monkeypatch):
    made, peak = [], 0

    def noting(name: str, module: nn.Module) -> torch.Tensor:
        nonlocal peak
        weight = dequantised_weight(name, module)
        made.append(StorageWeakRef(weight.untyped_storage()))
        peak = max(peak, sum(not each.expired() for each in made))
        return weight

    monkeypatch.setattr("peft_xmask.tuners.magnitude_mask.model.dequantised_weight", noting)
    get_peft_model(base.load(), masked(scope=scope))
    assert len(made) >= 5
    assert peak == 1
