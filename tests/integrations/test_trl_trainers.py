"""trl's other trainers: rewards, distillation, and what is experimental in it."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification
from trl_runs import CONFIGS, arguments, logged, pairs, rows, trained

METHODS = ("hard", "bottleneck", "masked", "over weights")


def as_config(method: str, task_type: str = "CAUSAL_LM"):
    config = copy.deepcopy(CONFIGS[method])
    config.task_type = task_type
    return config


def outputs(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("method", METHODS)
def test_a_reward_model(method, trl, llama, tokenizer, texts, tmp_path):
    def base():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1).eval()

    trainer = trl.RewardTrainer(
        model=base(),
        args=trl.RewardConfig(**arguments(tmp_path, max_steps=12)),
        train_dataset=rows([{"chosen": p["prompt"] + p["chosen"], "rejected": p["prompt"]} for p in pairs(texts)]),
        processing_class=tokenizer,
        peft_config=as_config(method, "SEQ_CLS"),
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    trainer.save_model()
    inputs = tokenizer(texts[:3], return_tensors="pt", padding=True)
    again = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(outputs(again, inputs), outputs(trainer.model, inputs))


@pytest.mark.parametrize("method", ["hard", "masked"])
def test_distillation(method, trl, base, tokenizer, texts, tmp_path):
    """The teacher is the base. The student starts elsewhere, and comes back."""
    torch.manual_seed(0)
    student = get_peft_model(base(), as_config(method))
    with torch.no_grad():
        for parameter in trained(student).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    trainer = trl.DistillationTrainer(
        model=student,
        teacher_model=base(),
        args=trl.DistillationConfig(**arguments(tmp_path, max_steps=8, max_completion_length=12)),
        train_dataset=rows([{"prompt": pair["prompt"]} for pair in pairs(texts)]),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert 0 < sum(losses[-2:]) < 0.9 * sum(losses[:2])


@pytest.mark.parametrize(("name", "method"), [("ORPO", "hard"), ("CPO", "masked"), ("TPO", "bottleneck")])
def test_preferences_without_a_reference(name, method, trl, base, tokenizer, texts, tmp_path):
    module = pytest.importorskip(f"trl.experimental.{name.lower()}")
    entries = pairs(texts)
    if name == "TPO":
        entries = [{**entry, "reference": entry["chosen"]} for entry in entries]
    trainer = getattr(module, f"{name}Trainer")(
        model=base(),
        args=getattr(module, f"{name}Config")(**arguments(tmp_path, max_steps=8, max_length=64)),
        train_dataset=rows(entries),
        processing_class=tokenizer,
        peft_config=as_config(method),
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert sum(losses[-3:]) < sum(losses[:3])
