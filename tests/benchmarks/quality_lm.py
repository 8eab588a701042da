"""The language model of the quality benchmark: stories260k-llama, which knows tales, reads what bank customers ask.

Accuracy is that of the next token, over all tokens of the texts; the loss in nats a token is kept beside it.
"""

import tempfile

import torch
from peft import IA3Config, LoraConfig, PeftConfig, VeraConfig, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from quality_method import Method, k_hot, of, xpeft
from quality_tasks import DATA
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer, TrainingArguments, set_seed

from peft_xmask import BottleneckConfig, MagnitudeMaskConfig, WeightAdapterConfig, profile_size
from peft_xmask.integrations import RecordCallback, WeightAdapterCallback, XPEFTCallback

TOKENS = 96
TESTED = 1000
LM = {"task_type": "CAUSAL_LM"}
LM_METHODS = {
    "base": Method(of(LoraConfig, **LM, target_modules=DUMMY_TARGET_MODULES)),
    "IA3": Method(of(IA3Config, **LM), start=3e-2),
    "VeRA r=64": Method(of(VeraConfig, **LM, r=64), start=0.1),
    "LoRA r=1": Method(of(LoraConfig, **LM, r=1, lora_alpha=2), start=1e-2),
    "LoRA r=8": Method(of(LoraConfig, **LM, r=8, lora_alpha=16), start=1e-2),
    "bottleneck b=16": Method(of(BottleneckConfig, **LM, bottleneck_size=16)),
    "X-PEFT hard 96 x 16": k_hot(96, 16, **LM),
    "X-PEFT hard 392 x 4": k_hot(392, 4, **LM),
    "X-PEFT soft 96 x 16": k_hot(96, 16, **LM, mask_type="soft"),
    "X-PEFT signs 96 x 16": xpeft(96, 16, **LM),
    "X-PEFT signs 96 x 4": xpeft(96, 4, **LM),
    "X-PEFT signs 96 x 8": xpeft(96, 8, **LM),
    "X-PEFT signs 392 x 4": xpeft(392, 4, **LM),
    "X-PEFT signs 1568 x 4": xpeft(1568, 4, **LM, start=0.3),
    "magnitude mask 0.5 %": Method(of(MagnitudeMaskConfig, **LM, density=0.005), start=3e-2),
    "magnitude mask 5 %": Method(of(MagnitudeMaskConfig, **LM, density=0.05), start=3e-2),
    "weight adapter, weight r=16": Method(of(WeightAdapterConfig, **LM, target="weight", r=16)),
}


def train_lm(task, parts, called, rate, seed, better_than):
    """One training; the line that is kept. Tested if its validation accuracy is above ``better_than``."""
    folder = DATA / "stories260k-llama"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    set_seed(seed)
    method = LM_METHODS[called]
    config: PeftConfig = method.config()
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    method.prepare(model)
    own = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    losses = []
    if own:
        hook = model.register_forward_hook(lambda module, args, output: losses.append(output.loss.detach()))
        _fit(model, _encode(tokenizer, parts.train), tokenizer, method, task, rate, seed)
        hook.remove()
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        size = profile_size(saved)
    validation, validation_loss = _evaluate(model, _encode(tokenizer, parts.validation), tokenizer)
    line = {
        "steps": task.steps, "method": called, "rate": rate, "seed": seed, "trained": own,
        "payload_bytes": (size.payload_bytes or 4 * own) if own else 0, "head_bytes": 0, "pool_bytes": size.pool_bytes,
        "losses": [round(float(part.mean()), 4) for part in torch.stack(losses).chunk(20)] if losses else [],
        "validation_accuracy": round(validation, 4), "validation_loss": round(validation_loss, 4),
    }  # fmt: skip
    if validation > better_than:
        accuracy, loss = _evaluate(model, _encode(tokenizer, parts.test[:TESTED]), tokenizer)
        line |= {"test_accuracy": round(accuracy, 4), "test_loss": round(loss, 4)}
    return line


def _fit(model, rows, tokenizer, method, task, rate, seed):
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=task.steps, per_device_train_batch_size=task.batch_size,
            learning_rate=1e-2 if method.masks else rate, weight_decay=0.0, warmup_steps=0.06, seed=seed,
            train_sampling_strategy="group_by_length", save_strategy="no", logging_strategy="no", report_to="none",
            disable_tqdm=True, use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False,
        )  # fmt: skip
        kind = model.peft_config["default"].peft_type
        if kind == "XPEFT":
            callback = XPEFTCallback(mask_learning_rate=rate)
        else:
            callback = WeightAdapterCallback() if kind == "WEIGHT_ADAPTER" else RecordCallback()
        trainer = Trainer(
            model=model, args=arguments, train_dataset=rows, data_collator=_Collator(tokenizer), callbacks=[callback]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()


def _encode(tokenizer, examples):
    ids = tokenizer([text for text, _ in examples], truncation=True, max_length=TOKENS)["input_ids"]
    return [{"input_ids": row} for row in ids]


class _Collator:
    """Pads on the right; padding is no label."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, rows):
        batch = dict(self.tokenizer.pad(rows, return_tensors="pt"))
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch


@torch.no_grad()
def _evaluate(model, rows, tokenizer):
    """Accuracy of the next token and loss in nats a token."""
    model.eval()
    right = total = 0
    nats = 0.0
    for start in range(0, len(rows), 64):
        batch = _Collator(tokenizer)(rows[start : start + 64])
        labels = batch.pop("labels").to(model.device)
        logits = model(**{name: part.to(model.device) for name, part in batch.items()}).logits[:, :-1].float()
        wanted = labels[:, 1:]
        there = wanted != -100
        nats += float(torch.nn.functional.cross_entropy(logits[there], wanted[there], reduction="sum"))
        right += int((logits.argmax(-1)[there] == wanted[there]).sum())
        total += int(there.sum())
    return right / total, nats / total
