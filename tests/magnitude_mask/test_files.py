"""What is saved, that it comes back the same, and what is refused."""

import pytest
import torch
from masked_models import base_tensors, layers_of, logits, values_of
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from peft_xmask import MagnitudeMaskConfig, PeftXMaskError, export_sparse_delta, profile_size
from peft_xmask.errors import BaseMismatchError, ConfigError, FileFormatError, MaskMismatchError, TargetError

KEY = "base_model.model.delta_table.magnitude_mask_values.weight"
FILE = "adapter_model.safetensors"


@pytest.mark.parametrize("storage_dtype", [None, "bfloat16", "float16"])
def test_every_door_on_the_real_encoder(storage_dtype, minilm_classifier, minilm_batch, masked, tmp_path):
    model = masked(base=minilm_classifier(), storage_dtype=storage_dtype, density=0.005)
    model.base_model.model.name_or_path = ""
    expected = logits(model, minilm_batch)
    model.save_pretrained(tmp_path)
    size = profile_size(tmp_path)
    trained = values_of(model).numel()
    assert trained == pytest.approx(0.005 * 10_616_832, rel=1e-3)
    assert size.payload_bytes == trained * (4 if storage_dtype is None else 2)
    assert size.file_bytes - size.head_bytes - size.payload_bytes <= 400

    assert torch.equal(logits(PeftModel.from_pretrained(minilm_classifier(), tmp_path), minilm_batch), expected)
    lean = PeftModel.from_pretrained(minilm_classifier(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(lean, minilm_batch), expected)
    auto = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    assert torch.equal(logits(auto, minilm_batch), expected)
    native = minilm_classifier()
    report = native.load_adapter(str(tmp_path))
    assert not report.missing_keys
    assert not report.unexpected_keys
    assert torch.equal(logits(native, minilm_batch), expected)
    trainable = PeftModel.from_pretrained(minilm_classifier(), tmp_path, is_trainable=True).eval()
    assert torch.equal(logits(trainable, minilm_batch), expected)
    assert values_of(trainable).dtype == torch.float32


def test_the_file_holds_values_only(masked, tmp_path):
    model = masked(task_type=None)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    assert {name: (tuple(each.shape), each.dtype) for name, each in tensors.items()} == {
        KEY: (tuple(values_of(model).shape), torch.float32)
    }
    assert torch.equal(tensors[KEY], values_of(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_profile_trained_in_float32_on_a_half_precision_base(dtype, masked, tiny_bert, tiny_batch, tmp_path):
    model = masked(density=0.2)
    model.save_pretrained(tmp_path)
    expected = logits(model, tiny_batch)
    low = PeftModel.from_pretrained(tiny_bert().to(dtype), tmp_path)
    torch.testing.assert_close(logits(low, tiny_batch).float(), expected, atol=0.05, rtol=0.05)
    with low.disable_adapter():
        own = base_tensors(low)
    logits(low, tiny_batch)
    for (name, mine), theirs in zip(layers_of(model).items(), layers_of(low).values(), strict=True):
        (one,), (other,) = mine.changes("default"), theirs.changes("default")
        assert torch.equal(one.indices.index, other.indices.index)
        expected = own[f"{name}.weight"].view(-1)[one.indices.index].float() + one.delta
        assert torch.equal(theirs.weight.view(-1)[one.indices.index], expected.to(dtype))


def spoiled(tmp_path, masked, change):
    masked(task_type=None).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    save_file(change(tensors), tmp_path / FILE, metadata={"format": "pt"})
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {KEY: t[KEY][:-1].clone()}, "Expected 540 floating point values"),
        (lambda t: {KEY: torch.cat([t[KEY], t[KEY]])}, "Expected 540 floating point values"),
        (lambda t: {KEY: t[KEY].int()}, r"found torch.int32 of shape \(540,\)"),
        (lambda t: {KEY: t[KEY].fill_(float("nan"))}, "found NaN or infinity"),
        (lambda t: {"other": t[KEY]}, "It is damaged"),
    ],
    ids=["short", "long", "integers", "nan", "another tensor"],
)
def test_damaged_files_are_refused(change, message, masked, tiny_bert, tmp_path):
    folder = spoiled(tmp_path, masked, change)
    with pytest.raises(FileFormatError, match=message):
        PeftModel.from_pretrained(tiny_bert(), folder)


def test_not_a_number_is_refused_through_transformers_own_loading_too(masked, tiny_bert, tiny_batch, tmp_path):
    native = tiny_bert()
    native.load_adapter(str(spoiled(tmp_path, masked, lambda t: {KEY: t[KEY].fill_(float("nan"))})))
    with pytest.raises(FileFormatError, match="NaN"):
        logits(native, tiny_batch)


def test_another_base_is_refused_with_both_fingerprints(masked, tiny_bert, tmp_path):
    model = masked()
    model.save_pretrained(tmp_path)
    found = masked(base=tiny_bert(seed=5)).peft_config["default"].mask_fingerprint
    for load in (lambda base: PeftModel.from_pretrained(base, tmp_path), lambda base: base.load_adapter(str(tmp_path))):
        base = tiny_bert(seed=5)
        with pytest.raises(MaskMismatchError) as info:
            load(base)
        assert (info.value.expected, info.value.found) == (model.peft_config["default"].mask_fingerprint, found)
        assert info.value.expected in str(info.value)
        assert found in str(info.value)
    edited = tiny_bert()
    with torch.no_grad():
        edited.bert.encoder.layer[1].output.dense.weight[0, 0] = 0.0
    with pytest.raises(MaskMismatchError):
        PeftModel.from_pretrained(edited, tmp_path)
    config = MagnitudeMaskConfig.from_pretrained(tmp_path)
    config.allow_any_base()
    assert PeftModel.from_pretrained(edited, tmp_path, config=config)


def test_a_random_mask_still_knows_its_base(masked, tiny_bert, tmp_path):
    masked(selection="random", seed=3).save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(tiny_bert(), tmp_path)
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(tiny_bert(seed=5), tmp_path)


def test_targets_that_cannot_be(tiny_bert, masked):
    from peft import get_peft_model
    from torch import nn
    from transformers import GPT2Config, GPT2LMHeadModel

    def refused(base, message, error=TargetError, **fields):
        names = set(base.state_dict())
        with pytest.raises(error, match=message):
            get_peft_model(base, MagnitudeMaskConfig(**{"density": 0.1, **fields}))
        assert set(base.state_dict()) == names

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    refused(gpt2, "tied weights", target_modules=["lm_head"])
    packed = nn.Sequential(nn.Linear(4, 4))
    packed[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    refused(packed, "weight of '0' is quantised .*Quantise with bitsandbytes", target_modules=["0"])
    refused(tiny_bert().to("meta"), "on the meta device", target_modules=["query"])
    refused(tiny_bert(), "selects none of the", density=0.0001)
    refused(tiny_bert(), "without a weight", target_modules=["dropout"])
    refused(tiny_bert(), "not found", ValueError, target_modules=["nothing"])
    refused(nn.Sequential(nn.Linear(2, 2)), "No default target_modules")
    refused(nn.Sequential(nn.MultiheadAttention(4, 2)), "is never called", target_modules=["out_proj"])


@pytest.mark.parametrize("density", [0, -0.1, 1.1, True, "a", float("nan")])
def test_densities_that_cannot_be(density):
    with pytest.raises(ConfigError, match="density="):
        MagnitudeMaskConfig(density=density)


@pytest.mark.parametrize(
    "fields", [{"selection": "median"}, {"scope": "layer"}, {"storage_dtype": "int8"}, {"seed": -1}, {"seed": 1.5}]
)
def test_fields_that_cannot_be(fields):
    with pytest.raises(PeftXMaskError, match=f"{next(iter(fields))}="):
        MagnitudeMaskConfig(**fields)


def test_profiles_of_one_mask_are_averaged_exactly(masked, tiny_batch, tmp_path):
    model = masked(task_type=None)
    torch.manual_seed(2)
    config = dict(density=0.1, init_weights=False)
    model.add_adapter("b", MagnitudeMaskConfig(**config))
    model.base_model.add_weighted_adapter(["default", "b"], [1.0, 3.0], "avg")
    expected = (values_of(model).double() + 3 * values_of(model, "b").double()) / 4
    assert torch.equal(values_of(model, "avg"), expected.float())
    assert model.active_adapters == ["default"]
    model.base_model.add_weighted_adapter(["default", "b"], [1.0, -1.0], "difference", combination_type="linear")
    torch.testing.assert_close(values_of(model, "difference"), values_of(model) - values_of(model, "b"))
    model.add_adapter("c", MagnitudeMaskConfig(**{**config, "selection": "largest"}))
    before = set(model.peft_config)
    for adapters, weights, name, error in (
        (["default", "c"], [1, 1], "new", MaskMismatchError),
        (["default", "nobody"], [1, 1], "new", ConfigError),
        (["default", "b"], [1, 1], "c", ConfigError),
        (["default", "b"], [1], "new", ConfigError),
        (["default", "b"], [1, -1], "new", ConfigError),
    ):
        with pytest.raises(error):
            model.base_model.add_weighted_adapter(adapters, weights, name)
    assert set(model.peft_config) == before


def test_a_sparse_delta_is_all_that_another_tool_needs(masked, tiny_bert, tiny_batch, tmp_path):
    model = masked(task_type=None, include_bias=True)
    export_sparse_delta(model, tmp_path / "delta.safetensors")
    plain = tiny_bert()
    tensors = load_file(tmp_path / "delta.safetensors")
    with torch.no_grad():
        for name in {key.rpartition(".")[0] for key in tensors}:
            plain.get_parameter(name).view(-1)[tensors[f"{name}.indices"]] += tensors[f"{name}.values"]
    assert torch.equal(logits(plain, tiny_batch), logits(model, tiny_batch))
    with pytest.raises(ConfigError, match="'other'"):
        export_sparse_delta(model, tmp_path / "delta.safetensors", "other")


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(masked, tiny_bert, tiny_batch, tmp_path):
    rows = [
        {"input_ids": ids, "attention_mask": torch.ones(7).long(), "labels": i % 4}
        for i, ids in enumerate(tiny_batch["input_ids"].repeat(3, 1))
    ]

    def run(folder, model, resume=None):
        arguments = TrainingArguments(
            str(folder), max_steps=6, save_steps=3, learning_rate=1e-2, per_device_train_batch_size=4,
            report_to=[], disable_tqdm=True, use_cpu=True, seed=3,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=resume)
        return values_of(model).detach().clone()

    own = base_tensors(masked())
    whole_model = masked()
    whole = run(tmp_path / "whole", whole_model)
    resumed = run(tmp_path / "again", masked(), str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(whole, resumed)
    assert not torch.equal(whole, values_of(masked()))
    with whole_model.disable_adapter():
        assert all(torch.equal(own[name], each) for name, each in base_tensors(whole_model).items())
