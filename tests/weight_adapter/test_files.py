"""What is saved, that it comes back the same, and what is refused."""

import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from adapted_models import base_tensors, layers_of, logits, same, stored
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
    Trainer,
    TrainingArguments,
)

from peft_xmask import BottleneckConfig, WeightAdapterCallback, WeightAdapterConfig, fold, profile_size
from peft_xmask.errors import BaseMismatchError, ConfigError, FileFormatError, PeftXMaskError, TargetError
from peft_xmask.integrations.weight_adapter import STATE_FILE

KEY = "base_model.model.delta_table.weight_adapter_delta.weight"
FILE = "adapter_model.safetensors"


@pytest.mark.parametrize(("target", "storage_dtype"), [("bias", None), ("bias", "float16"), ("both", "bfloat16")])
def test_every_door_on_the_real_encoder(target, storage_dtype, minilm_classifier, minilm_batch, adapted, tmp_path):
    model = adapted(base=minilm_classifier(), target=target, storage_dtype=storage_dtype)
    model.base_model.model.name_or_path = ""
    expected = logits(model, minilm_batch)
    assert not torch.allclose(expected, logits(minilm_classifier(), minilm_batch))
    model.save_pretrained(tmp_path)
    size = profile_size(tmp_path)
    numbers = 6 * (1536 + 384) + (12 * 1536 * 384 if target == "both" else 0)
    assert size.payload_bytes == numbers * (4 if storage_dtype is None else 2)
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


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("native", [False, True])
def test_training_goes_on_from_what_is_stored(native, low_cpu_mem_usage, adapted, biased_bert, tiny_batch, tmp_path):
    model = adapted(target="both", task_type=None)
    expected = logits(model, tiny_batch)
    model.save_pretrained(tmp_path)
    if native:
        loaded = biased_bert()
        loaded.load_adapter(str(tmp_path), is_trainable=True)
    else:
        loaded = PeftModel.from_pretrained(
            biased_bert(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
        )
    kept = stored(loaded).clone()
    assert torch.equal(logits(loaded.eval(), tiny_batch), expected)
    factors = [p for name, p in loaded.named_parameters() if "weight_adapter_" in name]
    assert len(factors) == 2 * 2 * 6
    assert all(p.requires_grad for p in factors)
    optimizer = torch.optim.Adam(factors, lr=1e-2)
    for _ in range(2):
        loaded.train()(**tiny_batch).logits.square().sum().backward()
        optimizer.step()
    assert torch.equal(stored(loaded), kept)
    trained = logits(loaded.eval(), tiny_batch)
    assert not torch.allclose(trained, expected)
    if not native:
        loaded.save_pretrained(tmp_path / "again")
        again = PeftModel.from_pretrained(biased_bert(), tmp_path / "again")
        assert torch.equal(logits(again, tiny_batch), trained)


@pytest.mark.parametrize("target", ["bias", "weight", "both"])
def test_the_file_is_the_same_size_for_every_width(target, adapted, tmp_path):
    sizes = set()
    for r in (1, 4, 64):
        model = adapted(target=target, r=r, task_type=None)
        model.save_pretrained(tmp_path / str(r))
        tensors = load_file(tmp_path / str(r) / FILE)
        numbers = sum(
            getattr(layer, part.name).numel()
            for layer in layers_of(model).values()
            for part in layer.weight_adapter_adapted["default"].adapted
        )
        assert {name: (tuple(each.shape), each.dtype) for name, each in tensors.items()} == {
            KEY: ((numbers,), torch.float32)
        }
        sizes.add((tmp_path / str(r) / FILE).stat().st_size)
    assert len(sizes) == 1


@pytest.mark.parametrize(("storage_dtype", "payload"), [(None, 491_520), ("float16", 245_760)])
def test_the_bytes_of_roberta_large(storage_dtype, payload, tmp_path):
    """Its real widths; the vocabulary, which is not adapted, is small, and weights are not initialised."""
    config = RobertaConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, vocab_size=30
    )
    with torch.device("meta"):
        base = RobertaModel(config)
    base = base.to(torch.float16).to_empty(device="cpu")
    for parameter in base.parameters():
        parameter.data.zero_()
    model = get_peft_model(base, WeightAdapterConfig(storage_dtype=storage_dtype))
    model.save_pretrained(tmp_path)
    size = profile_size(tmp_path)
    assert size.payload_bytes == payload
    assert size.file_bytes - payload <= 400


def spoiled(tmp_path, adapted, change, **fields):
    adapted(task_type=None, **fields).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    save_file(change(tensors), tmp_path / FILE, metadata={"format": "pt"})
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {KEY: t[KEY][:-1].clone()}, "Expected 120 floating point values"),
        (lambda t: {KEY: torch.cat([t[KEY], t[KEY]])}, "Expected 120 floating point values"),
        (lambda t: {KEY: t[KEY].int()}, r"found torch.int32 of shape \(120,\)"),
        (lambda t: {KEY: t[KEY].fill_(float("nan"))}, "found NaN or infinity"),
        (lambda t: {"other": t[KEY]}, "It is damaged"),
    ],
    ids=["short", "long", "integers", "nan", "another tensor"],
)
def test_damaged_files_are_refused(change, message, adapted, biased_bert, tmp_path):
    folder = spoiled(tmp_path, adapted, change)
    for trainable in (False, True):
        with pytest.raises(FileFormatError, match=message):
            PeftModel.from_pretrained(biased_bert(), folder, is_trainable=trainable)


def test_not_a_number_is_refused_through_transformers_own_loading_and_at_saving(
    adapted, biased_bert, tiny_batch, tmp_path
):
    native = biased_bert()
    native.load_adapter(str(spoiled(tmp_path, adapted, lambda t: {KEY: t[KEY].fill_(float("nan"))})))
    with pytest.raises(FileFormatError, match="NaN"):
        logits(native, tiny_batch)
    model = adapted()
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("inf"))
    with pytest.raises(FileFormatError, match="training diverged"):
        logits(model, tiny_batch)
    with pytest.raises(FileFormatError, match="training diverged"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new" / FILE).exists()


def test_another_base_and_another_target_are_refused(adapted, biased_bert, tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    for load in (lambda base: PeftModel.from_pretrained(base, tmp_path), lambda base: base.load_adapter(str(tmp_path))):
        with pytest.raises(BaseMismatchError) as info:
            load(biased_bert(seed=5))
        assert info.value.expected == model.peft_config["default"].base_fingerprint
        assert info.value.found == adapted(base=biased_bert(seed=5)).peft_config["default"].base_fingerprint
    config = WeightAdapterConfig.from_pretrained(tmp_path)
    config.allow_any_base()
    assert PeftModel.from_pretrained(biased_bert(seed=5), tmp_path, config=config)
    config = WeightAdapterConfig.from_pretrained(tmp_path)
    config.target = "weight"
    with pytest.raises(FileFormatError, match="Expected 2,304 floating point values"):
        PeftModel.from_pretrained(biased_bert(), tmp_path, config=config)


def test_a_base_of_zeros_is_told_apart_by_its_weights(tiny_bert, tmp_path):
    get_peft_model(tiny_bert(), WeightAdapterConfig()).save_pretrained(tmp_path)
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(tiny_bert(seed=5), tmp_path)


def test_targets_that_cannot_be(tiny_bert):
    def refused(base, message, **fields):
        names = set(base.state_dict())
        with pytest.raises((TargetError, ValueError), match=message):
            get_peft_model(base, WeightAdapterConfig(**fields))
        assert set(base.state_dict()) == names

    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=20)
    llama = LlamaForCausalLM(LlamaConfig(**sizes))
    refused(llama, r'None of the 3 targeted modules has a bias.*Use target="weight"')
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    refused(mixed, "Module '1' does not have a bias", target_modules=["0", "1"])
    refused(mixed, "No default target_modules")
    refused(tiny_bert(), "without a weight", target="weight", target_modules=["dropout"])
    refused(tiny_bert().to("meta"), "on the meta device", target_modules=["query"])
    refused(tiny_bert(), "not found", target_modules=["nothing"])
    refused(nn.Sequential(nn.MultiheadAttention(4, 2)), "is never called", target_modules=["out_proj"])
    for target in ("weight", "both"):
        model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), WeightAdapterConfig(target=target))
        assert len(layers_of(model)) == 3


@pytest.mark.parametrize(
    "fields",
    [{"target": "biases"}, {"r": 0}, {"r": 1.5}, {"activation": "step"}, {"scale": float("nan")}, {"scale": "1"},
     {"dropout": 1.0}, {"adapter_bias": "yes"}, {"storage_dtype": "int8"}],
    ids=str,
)  # fmt: skip
def test_fields_that_cannot_be(fields):
    with pytest.raises(PeftXMaskError, match=f"{next(iter(fields))}="):
        WeightAdapterConfig(**fields)


ALONE = """
import sys, torch
from safetensors.torch import load_file, load_model, save_model, save_file
from transformers import BertForSequenceClassification
model = BertForSequenceClassification.from_pretrained(sys.argv[1]).eval()
assert not {name for name in sys.modules if name.partition(".")[0] in ("peft", "peft_xmask")}
with torch.no_grad():
    save_file({"logits": model(**load_file(sys.argv[2])).logits}, sys.argv[3])
"""


@pytest.mark.parametrize("target", ["bias", "both"])
def test_a_folded_base_needs_neither_peft_nor_us(target, adapted, biased_bert, tiny_batch, tmp_path):
    model = adapted(target=target)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.mul_(2)
    own, expected = base_tensors(adapted(target=target)), logits(model, tiny_batch)
    fold(model, tmp_path / "folded")
    assert torch.equal(logits(model, tiny_batch), expected)
    with model.disable_adapter():
        assert same(base_tensors(model), own)
    names = set(load_file(tmp_path / "folded" / "model.safetensors"))
    assert names == set(biased_bert().state_dict()) - {"bert.embeddings.position_ids", "bert.embeddings.token_type_ids"}
    save_file(tiny_batch, tmp_path / "batch.safetensors")
    paths = [tmp_path / "folded", tmp_path / "batch.safetensors", tmp_path / "out.safetensors"]
    subprocess.run([sys.executable, "-c", ALONE, *map(str, paths)], check=True)
    assert torch.equal(load_file(paths[2])["logits"], expected)
    assert torch.equal(logits(BertForSequenceClassification.from_pretrained(paths[0]).eval(), tiny_batch), expected)


def test_what_cannot_be_folded(tiny_bert, tmp_path):
    with pytest.raises(ConfigError, match="Expected a PEFT model with"):
        fold(get_peft_model(tiny_bert(), BottleneckConfig()), tmp_path)
    plain = get_peft_model(nn.Sequential(nn.Linear(2, 2)), WeightAdapterConfig(target_modules=["0"]))
    with pytest.raises(ConfigError, match="Expected a model of transformers"):
        fold(plain, tmp_path)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(adapted, tiny_batch, tmp_path):
    rows = [
        {"input_ids": ids, "attention_mask": torch.ones(7).long(), "labels": i % 4}
        for i, ids in enumerate(tiny_batch["input_ids"].repeat(3, 1))
    ]

    def run(folder, model, resume=None, callbacks=(), **fields):
        arguments = TrainingArguments(
            str(folder), **{"max_steps": 6, "save_steps": 3, **fields}, learning_rate=1e-2,
            per_device_train_batch_size=4, report_to=[], disable_tqdm=True, use_cpu=True, seed=3,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks)).train(resume_from_checkpoint=resume)
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def made():
        return adapted(target="both", init_weights=True)

    start = {name: p.detach().clone() for name, p in made().named_parameters() if p.requires_grad}
    whole_model = made()
    whole = run(tmp_path / "whole", whole_model, callbacks=[WeightAdapterCallback()])
    assert (tmp_path / "whole" / "checkpoint-3" / STATE_FILE).is_file()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = run(tmp_path / "again", made(), str(checkpoint), [WeightAdapterCallback(resume_from=checkpoint)])
    assert same(whole, resumed)
    assert not any(torch.equal(whole[name], start[name]) for name in whole)
    assert whole_model.peft_config["default"].training["steps"] == 6
    own = base_tensors(made())
    with whole_model.disable_adapter():
        assert same(base_tensors(whole_model), own)

    (checkpoint / STATE_FILE).unlink()
    with pytest.warns(UserWarning, match="goes on from the change they made"):
        rebuilt = run(tmp_path / "third", made(), str(checkpoint), [WeightAdapterCallback()])
    assert not same(whole, rebuilt)


def test_a_checkpoint_of_another_run_is_refused(adapted, tiny_batch, tmp_path):
    rows = [{"input_ids": tiny_batch["input_ids"][0], "labels": 1}] * 4

    def trainer(folder, steps, callback, **fields):
        arguments = TrainingArguments(
            str(folder), max_steps=steps, save_steps=1, report_to=[], disable_tqdm=True, use_cpu=True
        )
        return Trainer(adapted(**fields), arguments, train_dataset=rows, callbacks=[callback])

    trainer(tmp_path / "one", 1, WeightAdapterCallback()).train()
    other = trainer(tmp_path / "two", 2, WeightAdapterCallback(resume_from=tmp_path / "one" / "checkpoint-1"), r=8)
    checkpoint = tmp_path / "one" / "checkpoint-1"
    (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(FileFormatError, match="another run"):
        other.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("target", ["bias", "weight", "both"])
def test_savers_of_whole_models(target, adapted, tiny_batch, tmp_path):
    """safetensors and accelerate refuse tensors that share memory: what is stored is one zero, until it is loaded."""
    model, other = (adapted(target=target, task_type=None) for _ in range(2))
    with torch.no_grad():
        for each in (each for each in other.parameters() if each.requires_grad):
            each.add_(0.1)
    expected = logits(model, tiny_batch)
    assert not torch.equal(logits(other, tiny_batch), expected)
    save_model(model, str(tmp_path / "whole.safetensors"))
    load_model(other, str(tmp_path / "whole.safetensors"))
    assert torch.equal(logits(other, tiny_batch), expected)
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    accelerator.save_state(str(tmp_path / "state"))
    with torch.no_grad():
        for each in (each for each in model.parameters() if each.requires_grad):
            each.add_(0.1)
    accelerator.load_state(str(tmp_path / "state"))
    assert torch.equal(logits(prepared, tiny_batch), expected)
