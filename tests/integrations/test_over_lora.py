"""X-PEFT masks and bottleneck adapters over a LoRA that is not merged."""

import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from peft_xmask import (
    BottleneckConfig,
    MagnitudeMaskConfig,
    ProfileBank,
    WeightAdapterConfig,
    XPEFTCallback,
    XPEFTConfig,
    as_base,
    export_lora,
)
from peft_xmask.errors import BaseMismatchError, ConfigError, MergeError, PeftXMaskWarning
from peft_xmask.tuners.base.base_fingerprint import check_fingerprint, joined

PLACES = {"other modules": ["query", "value"], "the same module": ["query", "value", r"output.dense"]}


def answers(model, batch, **kwargs):
    with torch.no_grad():
        return model.eval()(**batch, **kwargs).logits


def train_a_little(model, batch, steps=3):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(**batch, labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(params=PLACES)
def lora_folder(request, minilm_classifier, minilm_batch, tmp_path):
    """A LoRA and its head, trained on the real MiniLM."""
    torch.manual_seed(1)
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=PLACES[request.param], lora_dropout=0.1)
    train_a_little(get_peft_model(minilm_classifier(), config), minilm_batch).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


@pytest.fixture
def load_lora(lora_folder, minilm_classifier):
    return lambda: PeftModel.from_pretrained(minilm_classifier(), lora_folder, adapter_name="task").eval()


@pytest.fixture(params=PLACES)
def small_lora(request, tiny_bert, tiny_batch, tmp_path):
    """Loads a LoRA of a tiny model."""
    torch.manual_seed(1)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=PLACES[request.param], init_lora_weights=False)
    get_peft_model(tiny_bert(), config).save_pretrained(tmp_path / "lora")
    return lambda: PeftModel.from_pretrained(tiny_bert(), tmp_path / "lora", adapter_name="task").eval()


CONFIGS = {
    "xpeft": XPEFTConfig(task_type="SEQ_CLS", num_adapters=24),
    "bottleneck": BottleneckConfig(task_type="SEQ_CLS", bottleneck_size=8, init_weights=False),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def test_masks_train_over_a_frozen_lora_and_come_back(config, load_lora, minilm_batch, tmp_path):
    alone = answers(load_lora(), minilm_batch)
    base = as_base(load_lora())
    assert torch.equal(answers(base, minilm_batch), alone)
    lora = {name: tensor.clone() for name, tensor in base.state_dict().items()}

    model = get_peft_model(base, config)
    assert list(model.peft_config) == ["default"]
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert not any("lora_" in name for name in trainable)
    head = model.get_base_model().classifier
    assert torch.equal(
        head.modules_to_save["default"].weight, lora["classifier.weight"]
    )  # training starts at the LoRA's

    trained = answers(train_a_little(model, minilm_batch), minilm_batch)
    assert not torch.equal(trained, alone)
    with model.disable_adapter():
        assert torch.equal(answers(model, minilm_batch), alone)
    assert torch.equal(answers(model, minilm_batch), trained)

    model.save_pretrained(tmp_path / "masks")
    assert not [key for key in load_file(tmp_path / "masks" / "adapter_model.safetensors") if "lora_" in key]
    again = PeftModel.from_pretrained(as_base(load_lora()), tmp_path / "masks")
    assert torch.equal(answers(again, minilm_batch), trained)

    bare = model.unload()  # with the adapter's head, as PEFT's own unload
    bare.classifier.load_state_dict({name: lora[f"classifier.{name}"] for name in ("weight", "bias")})
    assert torch.equal(answers(bare, minilm_batch), alone)
    assert all(torch.equal(tensor, lora[name]) for name, tensor in bare.state_dict().items())
    assert torch.equal(answers(PeftModel.from_pretrained(bare, tmp_path / "masks"), minilm_batch), trained)


def test_the_lora_switched_off_leaves_the_masks_alone(config, load_lora, minilm_classifier, minilm_batch):
    over = get_peft_model(as_base(load_lora()), config)
    plain = get_peft_model(minilm_classifier(), config)
    plain.load_state_dict({k: v for k, v in over.state_dict().items() if k in plain.state_dict()}, strict=False)
    state = over.state_dict()
    with torch.no_grad():  # names differ where both are at the same module
        for name, tensor in [*plain.named_parameters(), *plain.named_buffers()]:
            if name in state:
                tensor.copy_(state[name])
    over.set_lora([])
    assert torch.equal(answers(over, minilm_batch), answers(plain, minilm_batch))
    over.set_lora("task")
    assert not torch.equal(answers(over, minilm_batch), answers(plain, minilm_batch))
    assert not any(parameter.requires_grad for name, parameter in over.named_parameters() if "lora_" in name)
    with pytest.raises(ConfigError, match=r"No LoRA 'other' beneath this adapter. There are: task"):
        over.set_lora("other")


def test_a_sequential_adapter_reads_what_the_lora_made_of_the_output(load_lora, minilm_batch):
    model = get_peft_model(as_base(load_lora()), XPEFTConfig(num_adapters=24))
    layer = model.get_base_model().bert.encoder.layer[0].output.dense
    x = torch.randn(2, 3, layer.in_features)
    y = layer.base_layer(x)
    pair = layer.pair("default")
    assert torch.allclose(layer(x), y + torch.relu(y @ pair.down.T) @ pair.up.T, atol=1e-6)


def test_a_bank_is_served_over_a_lora(load_lora, minilm_batch, tmp_path):
    people = XPEFTConfig(task_type="SEQ_CLS", num_adapters=24, num_profiles=3)
    model = get_peft_model(as_base(load_lora()), people)
    rows = torch.tensor([2, 0, 1])
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(**minilm_batch, labels=torch.tensor([0, 1, 2]), adapter_names=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = answers(model, minilm_batch, adapter_names=rows)
    model.set_profile(1)
    of_bob = answers(model, minilm_batch)
    ProfileBank.from_model(model, ["ann", "bob", "cid"]).save_pretrained(tmp_path / "bank")

    served = ProfileBank.from_pretrained(tmp_path / "bank").attach(as_base(load_lora()))
    assert torch.equal(answers(served, minilm_batch, adapter_names=["cid", "ann", "bob"]), expected)
    served.set_profile("bob")
    assert torch.equal(answers(served, minilm_batch), of_bob)
    with pytest.raises(ConfigError, match="No such profiles"):
        answers(served, minilm_batch, adapter_names=["task", "task", "task"])


def test_loras_that_transformers_loaded_become_a_base(lora_folder, minilm_classifier, minilm_batch):
    native = minilm_classifier()
    native.load_adapter(str(lora_folder), adapter_name="task")
    alone = answers(native, minilm_batch)
    model = get_peft_model(as_base(native), XPEFTConfig(task_type="SEQ_CLS", num_adapters=24))
    with model.disable_adapter():
        assert torch.equal(answers(model, minilm_batch), alone)


def test_the_lora_is_part_of_the_fingerprint(small_lora, tiny_bert, tiny_batch, tmp_path):
    over = get_peft_model(as_base(small_lora()), XPEFTConfig(num_adapters=24))
    plain = get_peft_model(tiny_bert(), XPEFTConfig(num_adapters=24))
    fingerprint, bare = (each.peft_config["default"].base_fingerprint for each in (over, plain))
    assert fingerprint.startswith(bare + "+")
    over.save_pretrained(tmp_path / "over")
    plain.save_pretrained(tmp_path / "plain")
    assert over.peft_config["default"].base_fingerprint == fingerprint
    with pytest.raises(
        BaseMismatchError, match=r"a LoRA beneath it with fingerprint .* has no LoRA beneath it"
    ) as error:
        PeftModel.from_pretrained(tiny_bert(), tmp_path / "over")
    assert (error.value.expected, error.value.found) == (fingerprint, bare)
    with pytest.raises(BaseMismatchError, match="no LoRA beneath it; the base at hand has a LoRA"):
        PeftModel.from_pretrained(as_base(small_lora()), tmp_path / "plain")
    other = small_lora()
    with torch.no_grad():
        other.get_base_model().bert.encoder.layer[0].attention.self.query.lora_A["task"].weight.neg_()
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(as_base(other), tmp_path / "over")
    config = XPEFTConfig.from_pretrained(tmp_path / "over")
    config.allow_any_base()
    PeftModel.from_pretrained(tiny_bert(), tmp_path / "over", config=config)

    over.set_lora([])
    over.save_pretrained(tmp_path / "off")  # trained, so far as anybody knows, without the LoRA
    PeftModel.from_pretrained(tiny_bert(), tmp_path / "off")


def test_other_ways_are_refused_before_anything_changes(small_lora, tiny_bert, tiny_batch, tmp_path):
    alone, masks = answers(small_lora(), tiny_batch), XPEFTConfig(task_type="SEQ_CLS", num_adapters=24)
    lora = small_lora()
    for base in (lora, lora.get_base_model()):
        with pytest.raises(ConfigError, match=r"get_peft_model\(as_base\(lora_model\)"):
            get_peft_model(base, masks, adapter_name="alice")
    assert list(lora.peft_config) == ["task"]
    assert torch.equal(answers(lora, tiny_batch), alone)
    with pytest.raises(ConfigError, match="has a LoRA called 'task'"):
        get_peft_model(as_base(small_lora()), masks, adapter_name="task")
    with pytest.raises(ConfigError, match="would deactivate the LoRA"):
        as_base(small_lora()).add_adapter(masks, "alice")
    for config in (MagnitudeMaskConfig(density=0.01), WeightAdapterConfig()):
        with pytest.raises(ConfigError, match="XPEFTConfig and BottleneckConfig can have a LoRA beneath"):
            get_peft_model(as_base(small_lora()), config)

    model = get_peft_model(tiny_bert(), masks)
    before = answers(model, tiny_batch)
    late = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    for add in (
        lambda: get_peft_model(model.get_base_model(), late),
        lambda: get_peft_model(model.get_base_model(), late, mixed=True),
        lambda: inject_adapter_in_model(late, model.get_base_model(), "task"),
    ):
        with pytest.raises(ConfigError, match="A LoRA goes beneath other adapters, not on top"):
            add()
    for mixed in (
        lambda: get_peft_model(tiny_bert(), masks, mixed=True),
        lambda: get_peft_model(tiny_bert(), late, mixed=True).add_adapter("alice", masks),
    ):
        with pytest.raises(ConfigError, match=r"PeftMixedModel .*get_peft_model\(as_base\(lora_model\)"):
            mixed()
    assert torch.equal(answers(model, tiny_batch), before)


def test_what_cannot_become_a_base(tiny_bert, small_lora):
    with pytest.raises(ConfigError, match="found none"):
        as_base(tiny_bert())
    with pytest.raises(ConfigError, match="found MaskTable, XPEFTLayer"):
        as_base(get_peft_model(tiny_bert(), XPEFTConfig(num_adapters=24)))
    merged = small_lora()
    merged.merge_adapter()
    with pytest.raises(ConfigError, match="merged into its weights"):
        as_base(merged)
    two = small_lora()
    two.add_adapter("other", LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    with pytest.raises(ConfigError, match=r"module 'classifier' of their own \(other, task\)"):
        as_base(two)
    two.delete_adapter("other")
    as_base(two)
    with pytest.raises(ConfigError, match="Use the base that as_base returned"):
        two.save_pretrained("nowhere")


def test_a_linear_adapter_merges_only_where_no_lora_is(small_lora, tiny_batch, tmp_path):
    alone = answers(small_lora(), tiny_batch)
    model = get_peft_model(as_base(small_lora()), XPEFTConfig(num_adapters=24, activation="identity"))
    unmerged = answers(model, tiny_batch)
    if hasattr(model.get_base_model().bert.encoder.layer[0].output.dense.base_layer, "lora_A"):
        for merge in (model.merge_adapter, model.merge_and_unload, lambda: export_lora(model, tmp_path / "as lora")):
            with pytest.raises(MergeError, match="with a LoRA beneath"):
                merge()
    else:
        model.merge_adapter()
        assert torch.allclose(answers(model, tiny_batch), unmerged, atol=1e-4)
        model.unmerge_adapter()
        assert torch.equal(answers(model, tiny_batch), unmerged)
        with pytest.warns(PeftXMaskWarning, match="was trained over a LoRA"):
            export_lora(model, tmp_path / "as lora")
        merged = model.merge_and_unload()
        assert torch.allclose(answers(merged, tiny_batch), unmerged, atol=1e-4)
        assert any("lora_" in name for name, _ in merged.named_parameters())
        return
    assert torch.equal(answers(model, tiny_batch), unmerged)
    assert torch.equal(answers(model.unload(), tiny_batch), alone)


def test_the_trainer_resumes_bit_identical_over_a_lora(small_lora, tmp_path):
    generator = torch.Generator().manual_seed(4)
    data = [
        {"input_ids": torch.randint(1, 60, (7,), generator=generator).tolist(), "labels": example % 4}
        for example in range(16)
    ]

    def run(folder, **kwargs):
        torch.manual_seed(0)
        model = get_peft_model(as_base(small_lora()), XPEFTConfig(task_type="SEQ_CLS", num_adapters=24))
        settings = TrainingArguments(
            str(folder), max_steps=6, save_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
            report_to=[], disable_tqdm=True,
        )  # fmt: skip
        Trainer(model, settings, train_dataset=data, callbacks=[XPEFTCallback()]).train(**kwargs)
        return model

    whole = run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    resumed = run(tmp_path / "resumed", resume_from_checkpoint=True)
    state = resumed.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.state_dict().items())


def test_auto_classes_refuse_masks_that_need_a_lora(load_lora, minilm_batch, tmp_path):
    get_peft_model(as_base(load_lora()), XPEFTConfig(task_type="SEQ_CLS", num_adapters=24)).save_pretrained(tmp_path)
    with pytest.raises(BaseMismatchError, match="no LoRA beneath"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5)


def test_a_quantised_base_is_known_by_its_lora():
    """Its weights have no fingerprint, so what is recorded begins with the sign between both."""
    recorded = joined(None, "77aa")
    assert recorded == "+77aa"
    assert check_fingerprint(recorded, joined(None, "77aa"), None) == recorded
    assert check_fingerprint(recorded, joined("8b1c", "77aa"), None) == "8b1c+77aa"  # the base, not quantised
    for found in (None, "8b1c", "+77ab"):
        with pytest.raises(BaseMismatchError):
            check_fingerprint(recorded, found, None)
