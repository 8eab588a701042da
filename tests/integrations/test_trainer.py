"""The real Trainer, with and without the callback."""

import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, Trainer, TrainingArguments

from peft_xmask import BottleneckConfig, XPEFTCallback, XPEFTConfig
from peft_xmask.errors import ConfigError
from peft_xmask.integrations.trainer import STATE_FILE

TEXTS = ["Reads bytes from a file.", "Sends a request over the network.", "Returns the sine of x.", "Sorts the list."]


class Rows(torch.utils.data.Dataset):
    """A small learnable task: the class is the first token modulo 3."""

    def __init__(self, count: int = 24, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(1, 60, (count, 6), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[0] % 3}


def xpeft(**kwargs) -> XPEFTConfig:
    return XPEFTConfig(
        **{"task_type": "SEQ_CLS", "num_adapters": 20, "bottleneck_size": 4, "learn_gain": True, **kwargs}
    )


def trainer_for(model: nn.Module, folder, callbacks=(), **kwargs) -> Trainer:
    arguments = dict(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=8, learning_rate=1e-2, report_to=[],
        logging_steps=1, save_strategy="no", disable_tqdm=True, use_cpu=True, seed=3,
    )  # fmt: skip
    args = TrainingArguments(**{**arguments, **kwargs})
    return Trainer(model, args, train_dataset=Rows(), eval_dataset=Rows(12, seed=1), callbacks=list(callbacks))


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def base_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("config", [xpeft(), xpeft(mask_type="soft"), BottleneckConfig(task_type="SEQ_CLS")])
def test_plain_trainer_trains_the_adapter_and_nothing_else(config, tiny_bert, tmp_path):
    from dataclasses import replace

    torch.manual_seed(0)
    model = get_peft_model(tiny_bert(), replace(config))
    trained, frozen = trained_state(model), base_state(model)
    pools = [buffer.clone() for name, buffer in model.named_buffers() if ".pool." in name]
    trainer = trainer_for(model, tmp_path)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert all(not torch.equal(trained[name], value) for name, value in trained_state(model).items())
    assert all(torch.equal(frozen[name], value) for name, value in base_state(model).items())
    after = [buffer for name, buffer in model.named_buffers() if ".pool." in name]
    assert all(torch.equal(a, b) for a, b in zip(pools, after, strict=True))
    assert sum(losses[-3:]) < sum(losses[:3])


def test_the_callback_gives_masks_their_own_learning_rate(tiny_bert, tmp_path):
    """With Adam the first step moves every weight by the learning rate, and so a logit by the masks' own."""
    model = get_peft_model(tiny_bert(), xpeft())
    table = model.base_model.table
    before = table.adapters["default"].logits.weight.detach() * table.adapters["default"].form.logit_scale
    trainer = trainer_for(
        model,
        tmp_path,
        [XPEFTCallback(mask_learning_rate=0.3)],
        max_steps=1,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_epsilon=1e-12,
    )
    trainer.train()
    after = table.adapters["default"].logits.weight.detach() * table.adapters["default"].form.logit_scale
    moved = (after - before).abs()
    assert moved.max() <= 0.3 + 1e-4
    assert moved.median() == pytest.approx(0.3, abs=0.01)
    assert model.peft_config["default"].logit_scale == pytest.approx(30.0)


def test_statistics_are_logged(tiny_bert, tmp_path):
    trainer = trainer_for(get_peft_model(tiny_bert(), xpeft()), tmp_path, [XPEFTCallback(0.5)])
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert all(0 < log["mask_entropy"] <= 1 for log in logs)
    assert "mask_churn" not in logs[0]
    assert any(log["mask_churn"] > 0 for log in logs[1:])
    assert all(log["mask_gain"] > 0 for log in logs)


def test_temperature_is_annealed(tiny_bert, tmp_path):
    model = get_peft_model(tiny_bert(), xpeft(estimator="softmax"))
    trainer_for(model, tmp_path, [XPEFTCallback(temperature=(4.0, 0.25))], max_steps=4).train()
    assert model.masks("default").form.temperature == pytest.approx(4.0 * (0.25 / 4.0) ** 0.75)


@pytest.mark.parametrize("kwargs", [{}, {"mask_type": "soft"}, {"gumbel_noise": 0.5, "estimator": "softmax"}])
def test_a_resumed_run_ends_bit_identical(kwargs, tiny_bert, tmp_path):
    def build() -> PeftModel:
        torch.manual_seed(0)
        return get_peft_model(tiny_bert(), xpeft(**kwargs))

    saving = dict(save_strategy="steps", save_steps=3, max_steps=8)
    whole = build()
    trainer_for(whole, tmp_path / "whole", [XPEFTCallback(temperature=(2.0, 0.5))], **saving).train()

    resumed = build()
    folder = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", folder / "checkpoint-3")
    trainer = trainer_for(resumed, folder, [XPEFTCallback(temperature=(2.0, 0.5))], **saving)
    trainer.train(resume_from_checkpoint=True)

    expected, found = trained_state(whole), trained_state(resumed)
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    for model, name in ((whole, "a"), (resumed, "b")):
        model.save_pretrained(tmp_path / name)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_checkpoint_elsewhere_can_be_named(tiny_bert, tmp_path):
    saving = dict(save_strategy="steps", save_steps=3, max_steps=6)
    whole = get_peft_model(tiny_bert(), xpeft())
    trainer_for(whole, tmp_path / "whole", [XPEFTCallback()], **saving).train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = get_peft_model(tiny_bert(seed=0), xpeft())
    callback = XPEFTCallback(resume_from=checkpoint)
    trainer_for(resumed, tmp_path / "other", [callback], **saving).train(resume_from_checkpoint=str(checkpoint))
    expected = trained_state(whole)
    assert all(torch.equal(expected[name], value) for name, value in trained_state(resumed).items())


def test_a_resume_without_the_training_state_says_so(tiny_bert, tmp_path):
    saving = dict(save_strategy="steps", save_steps=3, max_steps=6)
    model = get_peft_model(tiny_bert(), xpeft())
    trainer_for(model, tmp_path, **saving).train()
    assert not (tmp_path / "checkpoint-3" / STATE_FILE).exists()
    for callbacks, words in (
        ([], "training state is not in the file"),
        ([XPEFTCallback()], "without the training state"),
    ):
        shutil.rmtree(tmp_path / "checkpoint-6", ignore_errors=True)
        again = trainer_for(get_peft_model(tiny_bert(), xpeft()), tmp_path, callbacks, **saving)
        with pytest.warns(UserWarning, match=words):
            again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_load_best_model_at_end(tiny_bert, tmp_path):
    model = get_peft_model(tiny_bert(), xpeft())
    trainer = trainer_for(
        model, tmp_path, [XPEFTCallback()], save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    trainer.train()
    best = min(log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)
    assert trainer.evaluate()["eval_loss"] == best
    reloaded = PeftModel.from_pretrained(tiny_bert(), trainer.state.best_model_checkpoint)
    assert trainer_for(reloaded, tmp_path / "again").evaluate()["eval_loss"] == best


def gradients(model: nn.Module, tiny_batch, **kwargs) -> dict[str, torch.Tensor]:
    model.train()
    if kwargs:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        model.enable_input_require_grads()
    torch.manual_seed(5)
    model(**tiny_batch, labels=torch.tensor([0, 1, 2, 1])).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        xpeft(gumbel_noise=1.0, estimator="softmax"),
        xpeft(mask_type="soft"),
        BottleneckConfig(task_type="SEQ_CLS", init_weights=False),
    ],
)
def test_gradient_checkpointing_gives_the_same_gradients(config, use_reentrant, tiny_bert, tiny_batch):
    from dataclasses import replace

    torch.manual_seed(0)
    model = get_peft_model(tiny_bert(), replace(config))
    plain = gradients(model, tiny_batch)
    model.zero_grad()
    again = gradients(model, tiny_batch, use_reentrant=use_reentrant)
    assert plain.keys() == again.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, msg=name)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_the_trainer_with_gradient_checkpointing(use_reentrant, tiny_bert, tmp_path):
    ends = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(tiny_bert(), xpeft())
        kwargs = {"use_reentrant": use_reentrant} if checkpointing else None
        trainer_for(
            model, tmp_path, gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs=kwargs, max_steps=3
        ).train()
        ends.append(trained_state(model))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, atol=1e-6, rtol=1e-4)


def test_accumulated_gradients_equal_those_of_one_batch(tiny_bert, tiny_batch):
    torch.manual_seed(0)
    model = get_peft_model(tiny_bert(), xpeft(estimator="sigmoid")).train()
    labels = torch.tensor([0, 1, 2, 1])
    model(**tiny_batch, labels=labels).loss.backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    for row in range(4):
        part = {key: value[row : row + 1] for key, value in tiny_batch.items()}
        (model(**part, labels=labels[row : row + 1]).loss / 4).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, whole[name], msg=name)


def test_the_trainer_with_accumulation(tiny_bert, tmp_path):
    model = get_peft_model(tiny_bert(), xpeft())
    trainer = trainer_for(model, tmp_path, [XPEFTCallback()], gradient_accumulation_steps=3, max_steps=12)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert sum(losses[-3:]) < sum(losses[:3])


def test_bf16_autocast(tiny_bert, tmp_path):
    model = get_peft_model(tiny_bert(), xpeft())
    trainer = trainer_for(model, tmp_path, [XPEFTCallback()], bf16=True, max_steps=12)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_real_text_on_the_real_model(minilm, minilm_classifier, tmp_path):
    """Four sentences learnt by heart, through the real tokenizer and the real encoder."""
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    rows = [{**tokenizer(text), "labels": label} for label, text in enumerate(TEXTS)] * 4
    model = get_peft_model(minilm_classifier(4), XPEFTConfig(task_type="SEQ_CLS"))
    args = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=8, max_steps=30, learning_rate=1e-2, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=rows, processing_class=tokenizer, callbacks=[XPEFTCallback()])
    trainer.train()
    with torch.no_grad():
        logits = model.eval()(**tokenizer(TEXTS, return_tensors="pt", padding=True)).logits
    assert logits.argmax(-1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("kwargs", [{"mask_learning_rate": 0.0}, {"temperature": (1.0, -1.0)}])
def test_bad_numbers_are_refused(kwargs):
    with pytest.raises(ConfigError, match="expected a number above 0"):
        XPEFTCallback(**kwargs)
