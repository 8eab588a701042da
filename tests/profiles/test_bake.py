"""Profiles as LoRAs without a model: the same numbers as an export from one."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peft_xmask import AdapterPool, BottleneckConfig, XPEFTConfig, export_lora
from peft_xmask.bank.bake import LoraBaker
from peft_xmask.errors import (
    BaseMismatchError,
    ConfigError,
    FileFormatError,
    MaskFormatError,
    MergeError,
    PoolMismatchError,
    TargetError,
)
from peft_xmask.profiles import Profile, ProfileBank

NAMES = ["ann", "bob", "carol"]


def llama(**fields) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24)
    return LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2, **fields)).eval()


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=3, n_head=2)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("c_proj.bias"):
                parameter.normal_(std=0.3)
    return model


def adapted(base: torch.nn.Module, task: str | None = "CAUSAL_LM", **fields) -> PeftModel:
    """A model with three profiles that differ, in masks and gains."""
    settings = {"num_adapters": 12, "bottleneck_size": 4, "activation": "identity", "num_profiles": 3, **fields}
    model = get_peft_model(base, XPEFTConfig(task_type=task, **settings)).eval()
    with torch.no_grad():
        for weight in model.masks("default").trained_state().values():
            weight.normal_(std=0.01, generator=torch.Generator().manual_seed(1))
    return model


def exported(model: PeftModel, row: int, folder) -> dict[str, torch.Tensor]:
    model.set_profile(row)
    export_lora(model, folder)
    return load_file(folder / "adapter_model.safetensors")


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def lora_pool(tmp_path) -> AdapterPool:
    """A trained pool of four LoRAs over a tiny Llama."""
    folders = []
    for seed in range(4):
        torch.manual_seed(seed)
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=["down_proj", "q_proj"], r=3, init_lora_weights=False)
        get_peft_model(llama(), config).save_pretrained(tmp_path / f"lora-{seed}")
        folders.append(tmp_path / f"lora-{seed}")
    return AdapterPool.from_lora(folders)


CASES = {
    "parallel": (llama, {"insertion_form": "parallel"}),
    "sequential": (llama, {"insertion_form": "sequential"}),
    "soft masks": (llama, {"insertion_form": "parallel", "mask_type": "soft"}),
    "without gains": (llama, {"insertion_form": "parallel", "learn_gain": False}),
    "mean of k": (llama, {"insertion_form": "parallel", "mask_weighting": "mean", "top_k": 3}),
    "several modules, some layers": (
        llama,
        {
            "insertion_form": "parallel",
            "target_modules": ["q_proj", "gate_proj", "down_proj"],
            "layers_to_transform": [0, 2],
        },
    ),
    "all linear modules": (llama, {"insertion_form": "parallel", "target_modules": "all-linear"}),
    "sequential after modules with biases": (lambda: llama(mlp_bias=True), {"insertion_form": "sequential"}),
    "half-precision pool": (llama, {"insertion_form": "parallel", "pool_dtype": "bfloat16"}),
    "transposed weights, sequential": (gpt2, {"insertion_form": "sequential"}),
    "transposed weights, parallel": (gpt2, {"insertion_form": "parallel"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_baked_profile_is_the_exported_one_bit_for_bit(case, tmp_path):
    make, fields = CASES[case]
    make().save_pretrained(tmp_path / "base")
    model = adapted(make(), **fields)
    bank = ProfileBank.from_model(model, NAMES)
    bank.save_pretrained(tmp_path / "bank")
    bank = ProfileBank.from_pretrained(tmp_path / "bank")
    baked = dict(bank.to_lora(NAMES, tmp_path / "base"))
    for row, name in enumerate(NAMES):
        wanted = exported(model, row, tmp_path / name)
        assert same(baked[name].tensors, wanted)
        baked[name].save_pretrained(tmp_path / "again")
        assert same(load_file(tmp_path / "again" / "adapter_model.safetensors"), wanted)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "again" / file).read_bytes() == (tmp_path / name / file).read_bytes()
    assert not same(baked["ann"].tensors, baked["bob"].tensors)


def test_a_baked_profile_over_a_trained_pool(lora_pool, tmp_path):
    lora_pool.save_pretrained(tmp_path / "pool")
    llama().save_pretrained(tmp_path / "base")
    model = adapted(llama(), pool=str(tmp_path / "pool"), insertion_form="parallel")
    bank = ProfileBank.from_model(model, NAMES)
    assert same(bank.to_lora("bob", tmp_path / "base").tensors, exported(model, 1, tmp_path / "bob"))


@pytest.mark.parametrize("place", ["beside", "inside"])
def test_the_common_part_of_a_pool_is_baked_in(place, lora_pool, tmp_path):
    """Beside the mix it has ranks of its own, inside it is added."""
    if place == "beside":
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=["down_proj"], r=3, init_lora_weights=False)
        get_peft_model(llama(), config).save_pretrained(tmp_path / "common")
        pool = AdapterPool.random(12, 4).with_common(tmp_path / "common")
    else:
        pool = lora_pool.centred()
    pool.save_pretrained(tmp_path / "pool")
    llama().save_pretrained(tmp_path / "base")
    model = adapted(llama(), pool=str(tmp_path / "pool"), insertion_form="parallel")
    bank = ProfileBank.from_model(model, NAMES)
    baker = LoraBaker(bank, tmp_path / "base")
    lora = baker.bake(bank["bob"])
    assert baker.rank == lora.config.r == (4 + 3 if place == "beside" else 3)
    assert same(lora.tensors, exported(model, 1, tmp_path / "bob"))
    lora.save_pretrained(tmp_path / "again")
    tokens = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    served = PeftModel.from_pretrained(llama(), tmp_path / "again").eval()
    model.set_profile(1)
    with torch.no_grad():
        torch.testing.assert_close(served(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)


def test_biases_of_a_pool_come_along(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    folders = []
    for seed in range(3):
        torch.manual_seed(seed)
        fields = dict(insertion_form="parallel", activation="identity", bottleneck_size=3, init_weights=False)
        adapter = get_peft_model(llama(), BottleneckConfig(task_type="CAUSAL_LM", **fields))
        with torch.no_grad():
            for name, parameter in adapter.named_parameters():
                if parameter.requires_grad and "bias" in name:
                    parameter.normal_(std=0.2)
        adapter.save_pretrained(tmp_path / f"adapter-{seed}")
        folders.append(tmp_path / f"adapter-{seed}")
    AdapterPool.from_bottleneck(folders).save_pretrained(tmp_path / "pool")
    model = adapted(llama(), pool=str(tmp_path / "pool"), insertion_form="parallel")
    bank = ProfileBank.from_model(model, NAMES)
    baker = LoraBaker(bank, tmp_path / "base")
    assert baker.has_bias
    lora = baker.bake(bank["bob"])
    assert lora.config.lora_bias
    assert same(lora.tensors, exported(model, 1, tmp_path / "bob"))


def test_a_head_comes_along(tiny_bert, tmp_path):
    tiny_bert().save_pretrained(tmp_path / "base")
    model = adapted(tiny_bert(), "SEQ_CLS", insertion_form="parallel")
    lora = ProfileBank.from_model(model, NAMES).to_lora("carol", tmp_path / "base")
    assert same(lora.tensors, exported(model, 2, tmp_path / "carol"))
    assert any("classifier" in key for key in lora.tensors)


def test_names_of_a_checkpoint_saved_without_its_head(tiny_bert, tmp_path):
    """``encoder.layer.0...`` in the file, ``bert.encoder.layer.0...`` in the model."""
    tiny_bert().bert.save_pretrained(tmp_path / "base")
    model = adapted(tiny_bert(), "SEQ_CLS", insertion_form="sequential")
    lora = ProfileBank.from_model(model, NAMES).to_lora("carol", tmp_path / "base")
    assert same(lora.tensors, exported(model, 2, tmp_path / "carol"))


def test_a_checkpoint_in_several_files(tmp_path):
    llama().save_pretrained(tmp_path / "base", max_shard_size="4KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 3
    model = adapted(llama(), insertion_form="sequential")
    lora = ProfileBank.from_model(model, NAMES).to_lora("ann", tmp_path / "base")
    assert same(lora.tensors, exported(model, 0, tmp_path / "ann"))


def test_without_a_task_the_class_is_that_of_the_checkpoint(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = adapted(llama(), None, insertion_form="parallel")
    lora = ProfileBank.from_model(model, NAMES).to_lora("ann", tmp_path / "base")
    assert same(lora.tensors, exported(model, 0, tmp_path / "ann"))


def test_a_larger_rank_changes_no_output(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = adapted(llama(), insertion_form="parallel")
    lora = ProfileBank.from_model(model, NAMES).to_lora("bob", tmp_path / "base", rank=16)
    assert lora.config.r == lora.config.lora_alpha == 16
    lora.save_pretrained(tmp_path / "bob")
    tokens = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    served = PeftModel.from_pretrained(llama(), tmp_path / "bob").eval()
    model.set_profile(1)
    with torch.no_grad():
        torch.testing.assert_close(served(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(served(tokens).logits, llama()(tokens).logits, atol=1e-3)
    with pytest.raises(ConfigError, match="rank=3"):
        ProfileBank.from_model(model, NAMES).to_lora("bob", tmp_path / "base", rank=3)


def test_no_weight_is_read_of_a_parallel_bank_that_is_not_checked(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = adapted(llama(), insertion_form="parallel")
    bank = ProfileBank.from_model(model, NAMES)
    (tmp_path / "config").mkdir()
    shutil.copy(tmp_path / "base" / "config.json", tmp_path / "config")
    lora = bank.to_lora("ann", tmp_path / "config", check_base=False)
    assert same(lora.tensors, exported(model, 0, tmp_path / "ann"))
    with pytest.raises(FileFormatError, match="safetensors"):
        bank.to_lora("ann", tmp_path / "config")
    sequential = ProfileBank.from_model(adapted(llama(), insertion_form="sequential"), NAMES)
    with pytest.raises(FileFormatError, match="sequential"):
        sequential.to_lora("ann", tmp_path / "config", check_base=False)


def test_another_base_is_refused(tmp_path):
    bank = ProfileBank.from_model(adapted(llama(), insertion_form="parallel"), NAMES)
    llama().save_pretrained(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    flipped = {key: -tensor if "down_proj" in key else tensor for key, tensor in weights.items()}
    save_file(flipped, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseMismatchError, match="fingerprint") as error:
        bank.to_lora("ann", tmp_path / "base")
    assert error.value.expected != error.value.found
    assert bank.to_lora("ann", tmp_path / "base", check_base=False).tensors
    llama(attention_bias=False).config.save_pretrained(tmp_path / "other")
    gpt2().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(TargetError, match="name no module"):
        bank.to_lora("ann", tmp_path / "gpt2")
    with pytest.raises(ConfigError, match="neither a folder"):
        bank.to_lora("ann", tmp_path / "nowhere")


def test_a_base_of_another_depth_is_refused(tmp_path):
    bank = ProfileBank.from_model(adapted(llama(), insertion_form="parallel"), NAMES)
    config = llama().config
    config.num_hidden_layers = 2
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    with pytest.raises(BaseMismatchError, match="2 in"):
        bank.to_lora("ann", tmp_path / "base")


def test_another_pool_is_refused(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    bank = ProfileBank.from_model(adapted(llama(), insertion_form="parallel"), NAMES)
    bank.config.pool_seed = 5
    with pytest.raises(PoolMismatchError, match="fingerprint"):
        bank.to_lora("ann", tmp_path / "base")


def test_what_no_lora_can_say_is_refused(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    for fields in ({"activation": "relu"}, {"layer_norm": True}):
        bank = ProfileBank.from_model(adapted(llama(), **fields), NAMES)
        with pytest.raises(MergeError, match="linear map"):
            bank.to_lora("ann", tmp_path / "base")


def test_offsets_are_refused_from_a_model_too(tiny_bert, tmp_path):
    bank = ProfileBank.from_model(adapted(tiny_bert(), "SEQ_CLS", insertion_form="parallel"), NAMES)
    content = bank.content()
    offsets = torch.zeros(3, 8, dtype=torch.uint8)
    bank = ProfileBank(bank.config, content.bits, content.gain_bits, NAMES, content.shared, offsets)
    served = bank.attach(tiny_bert())
    served.set_profile("ann")
    with pytest.raises(MergeError, match="have offsets"):
        export_lora(served, tmp_path / "ann", "bank")


def test_offsets_are_refused(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    bank = ProfileBank.from_model(adapted(llama(), insertion_form="parallel"), NAMES)
    content = bank.content()
    offsets = torch.zeros(3, 4, dtype=torch.uint8)
    bank = ProfileBank(bank.config, content.bits, content.gain_bits, NAMES, content.shared, offsets)
    with pytest.raises(MergeError, match="offsets of 2 outputs"):
        bank.to_lora("ann", tmp_path / "base")


def test_a_quantised_base_serves_parallel_profiles_only(tmp_path):
    config = llama().config
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path / "base")
    model = adapted(llama(), insertion_form="parallel")
    lora = ProfileBank.from_model(model, NAMES).to_lora("ann", tmp_path / "base")
    assert same(lora.tensors, exported(model, 0, tmp_path / "ann"))
    with pytest.raises(MergeError, match="quantised"):
        ProfileBank.from_model(adapted(llama(), insertion_form="sequential"), NAMES).to_lora("ann", tmp_path / "base")


def test_unknown_names_and_damaged_masks_are_refused(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    bank = ProfileBank.from_model(adapted(llama(), insertion_form="parallel"), NAMES)
    with pytest.raises(KeyError, match="'dan'"):
        bank.to_lora("dan", tmp_path / "base")
    baker = LoraBaker(bank, tmp_path / "base")
    ann = bank["ann"]
    with pytest.raises(MaskFormatError):
        baker.bake(Profile(torch.zeros_like(ann.bits), ann.gain_bits))
    with pytest.raises(MaskFormatError):
        baker.bake(Profile(ann.bits[:, :1], ann.gain_bits))


def test_what_a_baker_says_of_its_loras(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    llama(mlp_bias=True).save_pretrained(tmp_path / "biased")
    parallel = ProfileBank.from_model(adapted(llama(), insertion_form="parallel"), NAMES)
    sequential = ProfileBank.from_model(adapted(llama(mlp_bias=True), insertion_form="sequential"), NAMES)
    plain, biased = LoraBaker(parallel, tmp_path / "base"), LoraBaker(sequential, tmp_path / "biased")
    assert (plain.rank, plain.has_bias, biased.has_bias) == (4, False, True)
    lora = plain.bake(parallel["ann"])
    assert lora.nbytes == 3 * 4 * (4 * 24 + 4 * 16)
    assert biased.bake(sequential["ann"]).config.lora_bias


def test_a_bottleneck_adapter_is_exported_as_before(tmp_path):
    """The same function writes both: with constants of the adapter's own biases."""
    config = BottleneckConfig(task_type="CAUSAL_LM", bottleneck_size=3, activation="identity")
    model = get_peft_model(llama(), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    tokens = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    export_lora(model, tmp_path / "lora")
    served = PeftModel.from_pretrained(llama(), tmp_path / "lora").eval()
    with torch.no_grad():
        torch.testing.assert_close(served(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)
