"""Text generation with a real small language model, adapted to real text."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    pipeline,
)

from peft_xmask import XPEFTCallback, XPEFTConfig
from peft_xmask.errors import ConfigError

PROMPTS = ["what is", "can you please tell me how much", "i"]
STEPS, BATCH = 40, 16


def queries(folder: Path, split: str, count: int) -> list[str]:
    """What people ask an assistant: nothing like the children's stories that the model knows."""
    with gzip.open(folder / "clinc150" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    return texts[:: len(texts) // count][:count]


@pytest.fixture(scope="module")
def llama(shared_data) -> Path:
    return shared_data / "stories260k-llama"


@pytest.fixture(scope="module")
def tokenizer(llama):
    return AutoTokenizer.from_pretrained(llama, padding_side="left")


def base_model(llama) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(llama).eval()


@pytest.fixture(scope="module")
def losses() -> dict[str, float]:
    """Held-out loss before and after, filled in by ``model``."""
    return {}


@pytest.fixture(scope="module")
def model(llama, tokenizer, shared_data, losses, tmp_path_factory) -> PeftModel:
    torch.manual_seed(0)
    config = XPEFTConfig(task_type="CAUSAL_LM", num_adapters=100, bottleneck_size=8)
    model = get_peft_model(base_model(llama), config)
    train, held_out = (
        [{"input_ids": tokenizer(text).input_ids} for text in queries(shared_data, split, count)]
        for split, count in (("train", STEPS * BATCH), ("validation", 128))
    )
    arguments = TrainingArguments(
        output_dir=str(tmp_path_factory.mktemp("run")), per_device_train_batch_size=BATCH, max_steps=STEPS,
        learning_rate=1e-2, lr_scheduler_type="constant", report_to=[], save_strategy="no", disable_tqdm=True,
        use_cpu=True, seed=0, per_device_eval_batch_size=64,
    )  # fmt: skip
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, arguments, collator, train, held_out, callbacks=[XPEFTCallback(0.1)])
    with model.disable_adapter():
        losses["base"] = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses["adapted"] = trainer.evaluate()["eval_loss"]
    return model.eval()


@pytest.fixture
def prompts(tokenizer) -> dict[str, torch.Tensor]:
    return dict(tokenizer(PROMPTS, return_tensors="pt", padding=True))


def generated(model: torch.nn.Module, inputs: dict[str, torch.Tensor], **kwargs) -> torch.Tensor:
    """What a model adds to the prompts."""
    torch.manual_seed(5)
    ids = model.generate(**inputs, **{"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **kwargs})
    return ids[:, inputs["input_ids"].shape[1] :]


WAYS = {"greedy": {}, "beams": {"num_beams": 3}, "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.8}}


def test_held_out_loss_falls_well_below_the_base(model, losses):
    assert losses["adapted"] < losses["base"] - 0.8, losses


@pytest.mark.parametrize("way", WAYS)
def test_cache_on_and_off_agree(way, model, prompts):
    cached, plain = (generated(model, prompts, use_cache=use, **WAYS[way]) for use in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_generated_survives_saving(way, model, llama, prompts, tmp_path):
    """Also beside the base's own text, which is another and comes back when the adapter is disabled."""
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(llama), tmp_path).eval()
    expected = generated(model, prompts, **WAYS[way])
    assert torch.equal(generated(loaded, prompts, **WAYS[way]), expected)
    plain = generated(base_model(llama), prompts, **WAYS[way])
    assert not torch.equal(plain, expected)
    with loaded.disable_adapter():
        assert torch.equal(generated(loaded, prompts, **WAYS[way]), plain)


def test_left_padding_changes_no_text(model, tokenizer, prompts):
    together = generated(model, prompts)
    for row, prompt in zip(together, PROMPTS, strict=True):
        alone = generated(model, dict(tokenizer(prompt, return_tensors="pt")))
        assert torch.equal(row[: alone.shape[1]], alone[0])


def test_the_pipeline_generates_the_same_text(model, tokenizer):
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    made = generate(PROMPTS, max_new_tokens=12, do_sample=False, return_full_text=False, batch_size=3)
    expected = generated(model, dict(tokenizer(PROMPTS, return_tensors="pt", padding=True)))
    assert [row[0]["generated_text"] for row in made] == tokenizer.batch_decode(expected, skip_special_tokens=True)


def test_rows_of_a_batch_may_belong_to_different_adapters(model, llama, tokenizer, tmp_path):
    """Each row of a mixed batch says what its own adapter says alone."""
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(llama), tmp_path, adapter_name="asks").eval()
    loaded.add_adapter("other", XPEFTConfig(task_type="CAUSAL_LM", num_adapters=100, bottleneck_size=8, scale=3.0))
    inputs = dict(tokenizer(["can you"] * 3, return_tensors="pt"))
    mixed = generated(loaded, inputs, adapter_names=["asks", "__base__", "other"])
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    assert torch.equal(mixed[0], generated(model, one)[0])
    assert torch.equal(mixed[1], generated(base_model(llama), one)[0])
    loaded.set_adapter("other")
    assert torch.equal(mixed[2], generated(loaded, one)[0])
    assert len({tuple(row.tolist()) for row in mixed}) == 3


@pytest.mark.parametrize("way", WAYS)
def test_rows_of_a_batch_may_belong_to_different_profiles(way, llama, tokenizer):
    """By number, with beams too: as each profile generates alone."""
    torch.manual_seed(0)
    config = XPEFTConfig(task_type="CAUSAL_LM", num_adapters=100, bottleneck_size=8, scale=3.0, num_profiles=3)
    model = get_peft_model(base_model(llama), config).eval()
    with torch.no_grad():
        model.masks("default").logits.weight.normal_(std=0.01)
    inputs = dict(tokenizer(["can you", "once upon", "the dog"], return_tensors="pt", padding=True))
    rows = torch.tensor([2, 0, 2])
    mixed = generated(model, inputs, adapter_names=rows, **WAYS[way])
    texts = []
    for row in (0, 2):
        model.set_profile(row)
        texts.append(generated(model, inputs, **WAYS[way]))
    if way != "sampling":  # where each row draws from one stream of chance
        assert torch.equal(mixed, torch.stack([texts[1][0], texts[0][1], texts[1][2]]))
    assert not torch.equal(*texts)
    assert torch.equal(generated(model, inputs, adapter_names=rows.tolist(), **WAYS[way]), mixed)
    with pytest.raises(ConfigError, match="got 2 and 3"):
        generated(model, inputs, adapter_names=rows[:2], **WAYS[way])


def test_gradients_flow_where_the_inputs_are_embeddings(model, prompts):
    embeddings = model.get_input_embeddings()(prompts["input_ids"])
    mask = prompts["attention_mask"]
    by_ids = model(**prompts).logits
    by_embeddings = model(inputs_embeds=embeddings, attention_mask=mask).logits
    assert torch.equal(by_ids, by_embeddings)
    by_embeddings.float().logsumexp(-1).sum().backward()
    weight = model.masks("default").logits.weight
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
    weight.grad = None
