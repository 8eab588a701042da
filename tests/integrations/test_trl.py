"""trl's trainers over a real small language model and real text."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from trl_runs import CONFIGS, arguments, logged, pairs, rows, trained

from peft_xmask import WeightAdapterCallback, XPEFTCallback
from peft_xmask.errors import PeftXMaskWarning


@pytest.fixture
def policy(base, tmp_path) -> Callable[[str, str], PeftModel]:
    """An adapter that is new, or one that was trained (its masks moved) and loaded from its file."""

    def build(config: str, door: str = "new") -> PeftModel:
        torch.manual_seed(0)
        model = get_peft_model(base(), copy.deepcopy(CONFIGS[config]))
        if door == "new":
            return model
        with torch.no_grad():
            for parameter in trained(model).values():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(tmp_path / "policy")
        return PeftModel.from_pretrained(base(), tmp_path / "policy", is_trainable=door == "to train")

    return build


def dpo_trainer(trl, model, tokenizer, texts, folder, callbacks=(), config=None, **kwargs):
    return trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(**arguments(folder, **kwargs)),
        train_dataset=rows(pairs(texts)),
        processing_class=tokenizer,
        peft_config=config,
        callbacks=list(callbacks),
    )


def reference(trainer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Log probabilities of the first batch under trl's reference, as its training step asks for them."""
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    trainer.model.train()
    return tuple(part.clone() for part in trainer.compute_ref_log_probs(trainer.model, batch))


def probabilities(trainer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The same under the model that is trained."""
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = trainer.model.eval()(**inputs).logits[:, :-1].log_softmax(-1)
    wanted = labels[:, 1:]
    scores = logits.gather(-1, wanted.clamp_min(0)[..., None])[..., 0] * (wanted >= 0)
    return scores.sum(1).chunk(2)


def close(first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.allclose(a, b, atol=1e-4) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("config", ["hard", "bottleneck", "masked", "over weights"])
def test_sft(config, trl, base, llama, tokenizer, texts, tmp_path):
    callbacks = {"hard": XPEFTCallback, "over weights": WeightAdapterCallback}
    trainer = trl.SFTTrainer(
        model=base(),
        args=trl.SFTConfig(**arguments(tmp_path, max_steps=12)),
        train_dataset=rows([{"text": text} for text in texts]),
        processing_class=tokenizer,
        peft_config=copy.deepcopy(CONFIGS[config]),
        callbacks=[callbacks[config]()] if config in callbacks else [],
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])

    trainer.save_model()
    inputs = tokenizer(texts[:3], return_tensors="pt", padding=True)
    again = PeftModel.from_pretrained(base(), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, trainer.model.eval()(**inputs).logits)
        with trainer.model.disable_adapter():
            assert torch.equal(base()(**inputs).logits, trainer.model(**inputs).logits)


@pytest.mark.parametrize(
    ("config", "door"),
    [
        ("hard", "new"),
        ("hard", "to train"),
        ("hard", "to serve"),
        ("soft", "to train"),
        ("soft", "to serve"),
        ("bottleneck", "to train"),
        ("masked", "new"),
        ("masked", "to train"),
        ("over weights", "new"),
        ("over weights", "to train"),
    ],
)
def test_the_reference_of_dpo_starts_as_the_policy_and_stays(config, door, trl, policy, tokenizer, texts, tmp_path):
    model = policy(config, door)
    model.eval()
    trainer = dpo_trainer(trl, model, tokenizer, texts, tmp_path)
    start = reference(trainer)
    assert close(start, probabilities(trainer))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert logged(trainer, "rewards/chosen")[0] == pytest.approx(0.0, abs=1e-5)
    assert logged(trainer, "rewards/margins")[0] == pytest.approx(0.0, abs=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(start, reference(trainer), strict=True))
    frozen = door == "to serve"
    assert close(start, probabilities(trainer)) == frozen
    said = [str(each.message) for each in caught if issubclass(each.category, PeftXMaskWarning)]
    assert any("loaded for inference" in words for words in said) == frozen


def test_the_reference_of_a_new_adapter_is_the_base(trl, base, tokenizer, texts, tmp_path):
    """``peft_config`` given to the trainer: trl disables the adapter. Random masks are not a start at the base."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS["hard"])
    trainer = dpo_trainer(trl, base(), tokenizer, texts, tmp_path, config=config, max_steps=24)
    with trainer.model.disable_adapter():
        of_the_base = probabilities(trainer)
    assert close(reference(trainer), of_the_base)
    assert not close(reference(trainer), probabilities(trainer))
    trainer.train()
    assert close(reference(trainer), of_the_base)
    losses = logged(trainer, "loss")
    assert sum(losses[-8:]) < sum(losses[:8])


def test_a_resumed_dpo_run_ends_bit_identical(trl, policy, tokenizer, texts, tmp_path):
    saving = dict(save_strategy="steps", save_steps=2, max_steps=4)
    whole = dpo_trainer(trl, policy("hard"), tokenizer, texts, tmp_path / "runs", [XPEFTCallback()], **saving)
    whole.train()
    checkpoint = tmp_path / "runs" / "checkpoint-2"
    callback = XPEFTCallback(resume_from=checkpoint)
    resumed = dpo_trainer(trl, policy("hard"), tokenizer, texts, tmp_path / "again", [callback], **saving)
    start = reference(resumed)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, value in trained(whole.model).items():
        assert torch.equal(value, trained(resumed.model)[name]), name
    assert close(start, reference(resumed))
    assert close(reference(whole), reference(resumed))
    assert "mask_entropy" in whole.state.log_history[0]


def test_noise_and_dropout_leave_the_reference_alone(trl, policy, tokenizer, texts, tmp_path):
    """Both are chance of the policy's training; trl asks its reference in training mode too."""
    noisy = dpo_trainer(trl, policy("noisy"), tokenizer, texts, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(reference(noisy), reference(noisy), strict=True))
    assert close(reference(noisy), probabilities(noisy))
    noisy.train()
    assert logged(noisy, "rewards/margins")[0] != 0.0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_reference_pass_before_backward_leaves_gradients_alone(use_reentrant, policy, tokenizer, texts):
    """Checkpointed blocks run again in backward, after the reference's pass: with the noise they had."""
    inputs = tokenizer(texts[:4], return_tensors="pt", padding=True)

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = policy("noisy").train()
        model.add_adapter("ref", model.peft_config["default"])
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        with torch.no_grad():
            model.set_adapter("ref")
            model(**inputs)
            model.set_adapter("default")
            model(**inputs)
        loss.backward()
        return {name: p.grad for name, p in trained(model).items()}

    plain, again = gradients(False), gradients(True)
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, msg=name)


def test_kto(trl, policy, tokenizer, texts, tmp_path):
    """Its reference is copied as that of DPO is: rewards are zero at the first step, and not after it."""
    entries = [
        {"prompt": pair["prompt"], "completion": pair["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
        for i, pair in enumerate(pairs(texts))
    ]
    trainer = trl.KTOTrainer(
        model=policy("hard", "to train"),
        args=trl.KTOConfig(**arguments(tmp_path, loss_type="apo_zero_unpaired")),
        train_dataset=rows(entries),
        processing_class=tokenizer,
    )
    trainer.train()
    rewards = logged(trainer, "rewards/chosen")
    assert rewards[0] == pytest.approx(0.0, abs=1e-5)
    assert abs(rewards[-1]) > 1e-3


def share_of_vowels(completions: list[str], **_: Any) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]


@pytest.mark.parametrize(
    ("algorithm", "config"),
    [("GRPO", "hard"), ("GRPO", "bottleneck"), ("GRPO", "masked"), ("GRPO", "over weights"), ("RLOO", "hard")],
)
def test_reinforcement_learning(algorithm, config, trl, policy, base, tokenizer, texts, tmp_path):
    model = policy(config, "to train")
    moved = {name: p.detach().clone() for name, p in trained(model).items()}
    kwargs = dict(num_generations=4, max_completion_length=12, beta=0.1, max_steps=3, disable_dropout=True)
    trainer = getattr(trl, f"{algorithm}Trainer")(
        model=model,
        args=getattr(trl, f"{algorithm}Config")(**arguments(tmp_path, **kwargs)),
        reward_funcs=share_of_vowels,
        train_dataset=rows([{"prompt": pair["prompt"]} for pair in pairs(texts)]),
        processing_class=tokenizer,
    )
    trainer.train()
    divergence, rewards = logged(trainer, "kl"), logged(trainer, "reward")
    assert divergence[0] == pytest.approx(0.0, abs=1e-5)  # the reference started as the policy
    assert divergence[-1] > 1e-5
    assert all(0 < reward < 1 for reward in rewards)
    assert any(not torch.equal(moved[name], p) for name, p in trained(model).items())
    assert all(torch.equal(moved[name], trained(model, "ref")[name.replace(".default.", ".ref.")]) for name in moved)

    model.save_pretrained(tmp_path / "saved", selected_adapters=["default"])
    inputs = tokenizer(texts[:3], return_tensors="pt", padding=True)
    again = PeftModel.from_pretrained(base(), tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)
        with model.disable_adapter():
            assert torch.equal(base()(**inputs).logits, model(**inputs).logits)
