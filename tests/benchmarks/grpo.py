"""Reinforcement learning with few bytes: GRPO with a reward that a program can check. Prints tables and a JSON line.

stories260k-llama continues the start of a tale, and trl's ``GRPOTrainer`` rewards what ``grpo_rewards.py`` counts in
it. Masks of 130 and 500 bytes are compared with LoRA r=1 and r=8, at PEFT's default modules (query and value) and at
the module that the masks adapt, with the base, and with a random mask of which only the five gains are trained.
All methods have the same prompts, batches, steps and seeds. Each method's learning rate climbs by factors of three
while the reward of seed 0 on validation prompts rises. The test uses other prompts. Finished trainings are JSON lines
in results/grpo.jsonl and are not run again; ``--redraw`` only prints them.
"""

import argparse
import logging
import tempfile
import time
from pathlib import Path

import peft
import torch
import transformers
import trl
from datasets import Dataset
from grpo_report import Lines, draw, markdown, show
from grpo_rewards import REWARDS, prompts
from peft import LoraConfig, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from quality_method import Method, of, xpeft
from quality_tasks import DATA
from timing import print_json
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed

from peft_xmask import profile_size
from peft_xmask.integrations import XPEFTCallback

STEPS, PROMPTS, GENERATIONS, TOKENS = 80, 4, 8, 24
TESTED = {"validation": 8, "test": 16}  # completions of each prompt
MARKS = 16  # parts of a training whose mean rewards are kept
LM = {"task_type": "CAUSAL_LM"}


def only_gains(model):
    """Leave the masks as they were drawn."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "gain" not in name:
            parameter.requires_grad_(False)


METHODS = {
    "base": Method(of(LoraConfig, **LM, target_modules=DUMMY_TARGET_MODULES)),
    "X-PEFT signs 96 x 16, gains alone": xpeft(96, 16, **LM, prepare=only_gains, payload=10),
    "X-PEFT signs 96 x 16": xpeft(96, 16, **LM),
    "X-PEFT signs 392 x 4": xpeft(392, 4, **LM),
    "LoRA r=1": Method(of(LoraConfig, **LM, r=1, lora_alpha=2), start=9e-3),
    "LoRA r=8": Method(of(LoraConfig, **LM, r=8, lora_alpha=16), start=9e-3),
    "LoRA r=1, FFN output": Method(of(LoraConfig, **LM, r=1, lora_alpha=2, target_modules=["down_proj"]), start=9e-3),
    "LoRA r=8, FFN output": Method(of(LoraConfig, **LM, r=8, lora_alpha=16, target_modules=["down_proj"]), start=9e-3),
}


def train(reward, called, rate, seed):
    """One training; the line that is kept."""
    folder = DATA / "stories260k-llama"
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    set_seed(seed)
    method, start = METHODS[called], time.process_time()
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), method.config())
    method.prepare(model)
    own = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    before = score(model, tokenizer, reward, "validation")[0]
    curve = fit(model, tokenizer, reward, method, rate, seed) if own else []
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        size = profile_size(saved).payload_bytes or 4 * own
    validation, _ = score(model, tokenizer, reward, "validation")
    tested, nats = score(model, tokenizer, reward, "test")
    return {
        "reward": reward, "steps": STEPS, "method": called, "rate": rate, "seed": seed, "trained": own,
        "payload_bytes": 0 if not own else size if method.payload is None else method.payload,
        "before": round(before, 4), "curve": curve, "validation": round(validation, 4), "test": round(tested, 4),
        "nats": round(nats, 4), "seconds": round(time.process_time() - start, 1),
    }  # fmt: skip


def fit(model, tokenizer, reward, method, rate, seed):
    """GRPO; mean rewards of :data:`MARKS` parts of the training."""
    count = REWARDS[reward]

    def rewarded(completions, **rest):
        return [count(text) for text in completions]

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=rewarded,
            args=trl.GRPOConfig(
                output_dir=folder, max_steps=STEPS, per_device_train_batch_size=PROMPTS * GENERATIONS,
                num_generations=GENERATIONS, max_completion_length=TOKENS, learning_rate=rate, weight_decay=0.0,
                warmup_steps=0.06, lr_scheduler_type="linear", seed=seed, logging_steps=1, save_strategy="no",
                report_to="none", disable_tqdm=True, use_cpu=True, bf16=False, gradient_checkpointing=False,
                dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_list([{"prompt": text} for text in prompts("train")]),
            processing_class=tokenizer,
            callbacks=[XPEFTCallback(mask_learning_rate=rate)] if method.masks else [],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()
    seen = torch.tensor([log["reward"] for log in trainer.state.log_history if "reward" in log])
    return [round(float(part.mean()), 4) for part in seen.chunk(MARKS)]


@torch.no_grad()
def score(model, tokenizer, reward, part):
    """Mean reward of sampled completions, and their mean nats per token under the base: how far they drifted."""
    model.eval()
    batch = tokenizer([text for text in prompts(part) for _ in range(TESTED[part])], return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    said = batch["input_ids"].shape[1]
    torch.manual_seed(0)
    full = model.generate(**batch, do_sample=True, top_k=0, max_new_tokens=TOKENS, pad_token_id=tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(full[:, said:], skip_special_tokens=True)
    found = sum(map(REWARDS[reward], texts)) / len(texts)
    new = full[:, said:]
    seen = torch.cat([batch["attention_mask"], (new != tokenizer.pad_token_id).long()], 1)
    base = AutoModelForCausalLM.from_pretrained(DATA / "stories260k-llama").eval()
    logits = base(input_ids=full, attention_mask=seen).logits[:, said - 1 : -1]
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), new.flatten(), reduction="none").view_as(new)
    real = new != tokenizer.pad_token_id
    return found, float((nats * real).sum() / real.sum())


def search(lines, reward, called):
    """Climb from a method's first rate by factors of three until seed 0's validation reward falls on both sides."""
    if called == "base":
        ensure(lines, reward, called, 0.0, 0)
        return
    here, tried = 0, {}

    def reached(step):
        if step not in tried:
            tried[step] = ensure(lines, reward, called, round(METHODS[called].start * 3.0**step, 6), 0)["validation"]
        return tried[step]

    for way in (1, -1):
        while reached(here + way) > reached(here):
            here += way


def ensure(lines, reward, called, rate, seed):
    """The line of one training, which is run unless it is there."""
    key = {"reward": reward, "steps": STEPS, "method": called, "rate": rate, "seed": seed}
    if not lines.find(**key):
        lines.keep(train(reward, called, rate, seed))
    line = lines.find(**key)[0]
    print(*key.values(), line["validation"], line["test"], line["nats"], line["seconds"], flush=True)
    return line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", nargs="+", default=list(REWARDS)[:1], choices=list(REWARDS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--redraw", action="store_true", help="print what has been measured, train nothing")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables as well")
    parser.add_argument("--plots", type=Path, help="folder for the plots: reward against steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    lines, facts = Lines(), {}
    for reward in options.rewards:
        for called in () if options.redraw else options.methods:
            search(lines, reward, called)
        for seed in () if options.redraw else range(1, options.seeds):
            for called in options.methods:
                ensure(lines, reward, called, lines.best(reward, called)["rate"], seed)
        facts[reward] = show(reward, options.seeds)
        if options.markdown:
            print(markdown(reward, options.seeds))
        if options.plots:
            draw(options.plots, reward, options.seeds)
    print_json({"benchmark": "grpo", "peft": peft.__version__, "trl": trl.__version__, "rewards": facts})


if __name__ == "__main__":
    main()
