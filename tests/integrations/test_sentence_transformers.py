"""The real SentenceTransformerTrainer over the real MiniLM. Its checkpoints are not PEFT's."""

import json
import shutil

import pytest
import torch
from torch import nn

from peft_xmask import (
    BottleneckConfig,
    MagnitudeMaskConfig,
    WeightAdapterCallback,
    WeightAdapterConfig,
    XPEFTCallback,
    XPEFTConfig,
)
from peft_xmask.errors import PeftXMaskWarning

sentence_transformers = pytest.importorskip("sentence_transformers")
datasets = pytest.importorskip("datasets")

ANCHORS = ["open the file", "close the socket", "sort the list", "sum the numbers"]
POSITIVES = ["read from disk", "end the connection", "put items in order", "add the values"]
METHODS = {
    "xpeft": (lambda: XPEFTConfig(num_adapters=20, bottleneck_size=4, learn_gain=True), XPEFTCallback),
    "weight adapter": (lambda: WeightAdapterConfig(target="bias", r=4), WeightAdapterCallback),
    "magnitude mask": (lambda: MagnitudeMaskConfig(density=0.01), None),
    "bottleneck": (lambda: BottleneckConfig(bottleneck_size=4), None),
}


@pytest.fixture
def build(minilm):
    def built(method: str = "xpeft") -> nn.Module:
        torch.manual_seed(0)
        model = sentence_transformers.SentenceTransformer(str(minilm), device="cpu")
        model.add_adapter(METHODS[method][0]())
        return model

    return built


def pairs(positives: list[str] = POSITIVES):
    return datasets.Dataset.from_dict({"anchor": ANCHORS * 4, "positive": positives * 4})


def train(model, folder, callback=None, resume=None, evaluated=None, **arguments):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    fields = dict(
        per_device_train_batch_size=4, max_steps=4, save_steps=2, learning_rate=1e-2, report_to=[], logging_steps=1,
        use_cpu=True, seed=3, disable_tqdm=True,
    )  # fmt: skip
    settings = sentence_transformers.SentenceTransformerTrainingArguments(str(folder), **{**fields, **arguments})
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model,
        settings,
        train_dataset=pairs(),
        eval_dataset=evaluated or pairs(),
        loss=MultipleNegativesRankingLoss(model),
        callbacks=[] if callback is None else [callback()],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_bit_identical(method, build, tmp_path):
    callback = METHODS[method][1]
    whole, resumed = build(method), build(method)
    fresh = trained_state(whole)
    train(whole, tmp_path / "whole", callback)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    train(resumed, tmp_path / "resumed", callback, resume=True)
    expected, found = trained_state(whole), trained_state(resumed)
    assert expected.keys() == found.keys()
    for name in expected:
        assert not torch.equal(expected[name], fresh[name]), name
        assert torch.equal(expected[name], found[name]), name


@pytest.mark.parametrize("method", ["xpeft", "weight adapter"])
def test_a_resume_without_the_callback_says_so_and_serves_what_was_saved(method, build, tmp_path):
    train(build(method), tmp_path, METHODS[method][1], max_steps=2)
    saved = sentence_transformers.SentenceTransformer(str(tmp_path / "checkpoint-2"), device="cpu")
    resumed = build(method)
    resumed.load_state_dict(saved.state_dict())
    assert (resumed.eval().encode(ANCHORS) == saved.encode(ANCHORS)).all()
    (next((tmp_path / "checkpoint-2").glob("*_training_state.safetensors"))).unlink()
    with pytest.warns(PeftXMaskWarning, match="without the"):
        train(build(method), tmp_path, METHODS[method][1], resume=True)


def test_the_best_checkpoint_is_served_at_the_end(build, tmp_path):
    """Evaluated on wrong pairs, which training makes worse, the best checkpoint is not the last."""
    model = build()
    trainer = train(
        model, tmp_path, XPEFTCallback, evaluated=pairs(POSITIVES[::-1]), save_steps=1, eval_strategy="steps",
        eval_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert min(losses) < losses[-1]
    assert trainer.evaluate()["eval_loss"] == min(losses)
    best = sentence_transformers.SentenceTransformer(trainer.state.best_model_checkpoint, device="cpu")
    assert (model.eval().encode(ANCHORS) == best.encode(ANCHORS)).all()


def test_the_callback_sets_the_masks_learning_rate_and_records_the_run(build, tmp_path):
    model = build()
    trainer = train(model, tmp_path, XPEFTCallback)
    config = json.loads((tmp_path / "checkpoint-4" / "adapter_config.json").read_text())
    assert config["logit_scale"] == pytest.approx(10.0)
    assert config["training"]["steps"] == 4
    assert config["training"]["mask_learning_rate"] == 0.1
    assert all(0 < log["mask_entropy"] <= 1 for log in trainer.state.log_history if "loss" in log)
