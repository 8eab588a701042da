"""What `train` wrote answers the same through its card, the Auto classes, a pipeline and a bank as through `eval`."""

import json
import re

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

from peft_xmask import MeanPooledClassifier, ProfileBank, XPEFTConfig
from peft_xmask.errors import ConfigError, FileFormatError
from peft_xmask.integrations.pooled_classifier import read_classifier

COLUMNS = ("--text", "doc", "--label", "chapter")
TRAINED = ("--max-steps", 12, "--batch-size", 16, "--max-length", 24, "--num-adapters", 20, "--bottleneck-size", 8)
METHODS = ("xpeft", "bottleneck", "magnitude-mask", "weight-adapter", "lora", "head")


@pytest.fixture(scope="module")
def trained(data, minilm, tmp_path_factory):
    """Train once for each method and pooling; its folder, and the labels that `eval` predicts."""
    from peft_xmask.cli import run

    made = {}

    def get(method: str, pooling: str):
        if (method, pooling) not in made:
            out = tmp_path_factory.mktemp("doors") / method
            common = ("--data", data["jsonl"], *COLUMNS)
            command = ("train", "--base", minilm, *common, *TRAINED, "--method", method, "--pooling", pooling)
            assert run([str(part) for part in (*command, "--out", out)]) == 0
            found = out.parent / "predictions.jsonl"
            command = ("eval", "--adapter", out, *common, "--predictions", found)
            assert run([str(part) for part in command]) == 0
            rows = [json.loads(line) for line in found.read_text(encoding="utf-8").splitlines()]
            made[method, pooling] = out, [row["text"] for row in rows], [row["predicted"] for row in rows]
        return made[method, pooling]

    return get


@pytest.mark.parametrize("pooling", ["mean", "model"])
@pytest.mark.parametrize("method", METHODS)
def test_the_cards_code_gives_what_eval_says(method, pooling, trained, capsys):
    folder, texts, predicted = trained(method, pooling)
    card = (folder / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert '["A text to classify."]' in code
    code = code.replace("path-or-hub-id-of-this-adapter", str(folder)).replace('["A text to classify."]', repr(texts))
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out.strip() == str(predicted)
    assert len(set(predicted)) > 1


@pytest.mark.parametrize("pooling", ["mean", "model"])
@pytest.mark.parametrize("method", ["xpeft", "magnitude-mask", "lora"])
def test_a_pipeline_and_the_auto_class_find_it_by_its_folder(method, pooling, trained):
    folder, texts, predicted = trained(method, pooling)
    classify = pipeline("text-classification", str(folder), device="cpu")
    assert [answer["label"] for answer in classify(texts, truncation=True)] == predicted
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, truncation=True, return_tensors="pt")
    assert batch["input_ids"].shape[1] <= 24
    with torch.no_grad():
        numbers = model(**batch).logits.argmax(-1).tolist()
    assert [model.config.id2label[number] for number in numbers] == predicted


def test_a_bank_built_of_it_keeps_the_labels_and_answers_the_same(trained, cli, tmp_path, capsys):
    folder, texts, predicted = trained("xpeft", "mean")
    assert cli("bank", "build", f"alice={folder}", "--out", tmp_path / "bank").status == 0
    assert read_classifier(tmp_path / "bank") == read_classifier(folder)
    code = re.search(r"```python\n(.*?)```", (tmp_path / "bank" / "README.md").read_text(), re.DOTALL)[1]
    code = code.replace("path-or-hub-id-of-this-adapter", str(tmp_path / "bank"))
    code = code.replace('["A text to classify."]', repr(texts)).replace("[next(iter(bank))]", "['alice'] * 60")
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out.strip() == str(predicted)


def test_a_head_on_other_states_is_refused(trained, minilm):
    folder, _, _ = trained("xpeft", "mean")
    bank = ProfileBank.from_pretrained(folder)
    other = AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=3)
    with pytest.raises(ConfigError, match="reads pooling='mean', the model at hand has 'model'"):
        bank.attach(other)


def test_labels_in_another_order_are_refused_and_missing_names_are_given(trained, minilm):
    folder, _, _ = trained("xpeft", "model")
    names = list(read_classifier(folder).labels)
    bank = ProfileBank.from_pretrained(folder)
    swapped = AutoModelForSequenceClassification.from_pretrained(minilm, id2label=dict(enumerate(names[::-1])))
    with pytest.raises(ConfigError, match="the same in another order"):
        bank.attach(swapped)
    unnamed = AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=3)
    assert list(bank.attach(unnamed).config.id2label.values()) == names


def test_a_damaged_config_is_refused(trained, tmp_path):
    with pytest.raises(FileFormatError, match="found none"):
        read_classifier(tmp_path)
    for content in ("{", "[]", '{"model_type": "bert"}', '{"model_type": "pooled_classifier", "id2label": {"x": "a"}}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(FileFormatError, match="is damaged"):
            read_classifier(tmp_path)


SHAPE = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def test_a_whole_classifier_is_saved_and_found_by_the_auto_class(tmp_path):
    torch.manual_seed(0)
    model = MeanPooledClassifier(BertModel(BertConfig(**SHAPE)), 3).eval()
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = torch.arange(1, 9).view(2, 4)
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    assert again.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert AutoConfig.from_pretrained(tmp_path).backbone_config["model_type"] == "bert"


def test_an_adapter_that_the_trainer_saved_answers_the_same_through_the_auto_class(tmp_path):
    from peft import get_peft_model

    torch.manual_seed(0)
    backbone = BertModel(BertConfig(**SHAPE))
    backbone.save_pretrained(tmp_path / "base")
    backbone = BertModel.from_pretrained(tmp_path / "base")
    model = MeanPooledClassifier(backbone, 2)
    model.config.id2label = {0: "no", 1: "yes"}
    model = get_peft_model(model, XPEFTConfig(task_type="SEQ_CLS", num_adapters=8, bottleneck_size=2))
    rows = [{"input_ids": [1, 2, 3 + i], "labels": i % 2} for i in range(8)]
    arguments = TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to=[], max_steps=3, learning_rate=0.1)
    Trainer(model, arguments, train_dataset=rows).train()
    model.eval().save_pretrained(tmp_path / "adapter")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    ids = torch.arange(1, 9).view(2, 4)
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    assert again.config.id2label == {0: "no", 1: "yes"}
