"""Images and sequence-to-sequence through the real Trainers."""

import gzip
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from peft_xmask import BottleneckConfig, XPEFTCallback, XPEFTConfig

ARGUMENTS = dict(report_to=[], disable_tqdm=True, use_cpu=True, seed=0, save_strategy="no", learning_rate=1e-2)


def digits(wanted: range) -> list[dict]:
    """Real handwritten digits of some classes, 8 x 8 pixels."""
    found = pytest.importorskip("sklearn.datasets").load_digits()
    return [
        {"pixel_values": torch.tensor(image, dtype=torch.float32)[None] / 8 - 1, "labels": int(label) - wanted.start}
        for image, label in zip(found.images, found.target, strict=True)
        if label in wanted
    ]


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    sizes = dict(image_size=8, patch_size=2, num_channels=1, hidden_size=48, num_hidden_layers=2, num_labels=5)
    heads = dict(num_attention_heads=4, intermediate_size=96, hidden_dropout_prob=0.0, initializer_range=0.1)
    return ViTForImageClassification(ViTConfig(**sizes, **heads))


@pytest.fixture(scope="module")
def base_weights(tmp_path_factory) -> dict[str, torch.Tensor]:
    """A vision transformer that knows the digits 0 to 4."""
    model = vit()
    train(model, digits(range(5)), tmp_path_factory.mktemp("base"), learning_rate=3e-3)
    return model.state_dict()


def train(model, rows, folder, callbacks=(), **arguments) -> None:
    fields = {**ARGUMENTS, "num_train_epochs": 10, **arguments}
    settings = TrainingArguments(output_dir=str(folder), per_device_train_batch_size=32, **fields)
    Trainer(model, settings, train_dataset=rows, callbacks=list(callbacks)).train()


def predictions(model, rows) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=torch.stack([row["pixel_values"] for row in rows])).logits


@pytest.mark.parametrize("config_cls", [XPEFTConfig, BottleneckConfig])
def test_digits_that_a_vision_transformer_has_not_seen(config_cls, base_weights, tmp_path):
    """Five new classes: better with the adapter than with the head alone, which starts where it does."""
    rows = digits(range(5, 10))
    train_rows, test_rows = rows[:600], rows[600:]
    labels = torch.tensor([row["labels"] for row in test_rows])

    def base() -> ViTForImageClassification:
        model = vit()
        model.load_state_dict(base_weights)
        return model

    size = {"num_adapters": 400} if config_cls is XPEFTConfig else {}
    torch.manual_seed(1)
    model = get_peft_model(base(), config_cls(bottleneck_size=8, modules_to_save=["classifier"], **size))
    train(model, train_rows, tmp_path, [XPEFTCallback(0.1)] if config_cls is XPEFTConfig else [])
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    assert torch.equal(predictions(loaded, test_rows), predictions(model, test_rows))

    head_only = base().requires_grad_(False)
    head_only.classifier.requires_grad_(True)
    train(head_only, train_rows, tmp_path)
    adapted, plain = (
        (predictions(each, test_rows).argmax(-1) == labels).float().mean() for each in (loaded, head_only)
    )
    assert adapted > plain + 0.02, (adapted, plain)


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = dict(vocab_size=512, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0)
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2))


@pytest.mark.parametrize("config_cls", [XPEFTConfig, BottleneckConfig])
def test_domains_of_real_queries_with_t5(config_cls, shared_data, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "stories260k-llama")
    folder = shared_data / "clinc150"
    with gzip.open(folder / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        examples = [json.loads(line) for line in lines][::40]
    rows = [
        {
            "input_ids": tokenizer(example["text"]).input_ids,
            "labels": [*tokenizer(str(example["label"]).replace("_", " "), add_special_tokens=False).input_ids, 2],
        }
        for example in examples
    ]
    torch.manual_seed(1)
    size = {"num_adapters": 100} if config_cls is XPEFTConfig else {}
    model = get_peft_model(t5(), config_cls(task_type="SEQ_2_SEQ_LM", bottleneck_size=8, **size))
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=32, per_device_eval_batch_size=32, max_steps=30,
        predict_with_generate=True, generation_max_length=6, **ARGUMENTS,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(
        model,
        arguments,
        DataCollatorForSeq2Seq(tokenizer, model),
        train_dataset=rows[64:],
        eval_dataset=rows[:64],
        callbacks=[XPEFTCallback(0.1)] if config_cls is XPEFTConfig else [],
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before - 0.5

    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(t5(), tmp_path / "adapter").eval()
    batch = tokenizer([example["text"] for example in examples[:4]], return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    for beams in (1, 3):
        first, second = (
            each.eval().generate(**batch, max_new_tokens=6, num_beams=beams, do_sample=False)
            for each in (model, loaded)
        )
        assert torch.equal(first, second)
