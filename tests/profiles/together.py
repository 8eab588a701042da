"""train_profiles in two processes, run by test_together.py under ``accelerate launch`` and, in part, in one process."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import Trainer, default_data_collator

from peft_xmask.errors import ConfigError
from peft_xmask.profiles import ProfileCollator, RowAdamW, train_profiles

path = Path(__file__).with_name("taught.py")
spec = importlib.util.spec_from_file_location("taught", path)
taught = importlib.util.module_from_spec(spec)
spec.loader.exec_module(taught)

RUNS = {
    "joint": {"head": "joint", "mask_type": "soft"},
    "frozen": {"head": "frozen", "mask_type": "soft", "accumulated": 2, "turned": {"bob": 4, "Zoë": 4}},
    "first": {"head": "first", "mask_type": "soft"},
    "hard": {"head": "joint", "mask_type": "hard"},
}
"""Soft masks follow their logits smoothly; which of two equal logits a hard mask takes, a rounding error decides."""

BATCH = 8  # examples of a step, in all processes


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Rows as they are trained, and the head."""
    found = {name: part for name, part in model.named_parameters() if "xpeft_" in name or "modules_to_save" in name}
    return {name: part.detach().clone() for name, part in found.items()}


def arguments(folder: Path, processes: int, accumulated: int = 1, **fields):
    share = BATCH // processes // accumulated
    return taught.arguments(
        folder, per_device_train_batch_size=share, gradient_accumulation_steps=accumulated,
        ddp_find_unused_parameters=False, **fields,
    )  # fmt: skip


def train(run: str, folder: Path, processes: int, **fields):
    """A run of the same batches, however many processes share them; what is in the model then, and the bank."""
    model = taught.base(dropout=0.0)
    facts = RUNS[run]
    if PartialState().process_index and facts["head"] == "joint":
        with torch.no_grad():
            model.classifier.weight.normal_()  # a head that is new in each process: that of the first is trained
    settings = {
        "config": taught.config(mask_type=facts["mask_type"]), "head": facts["head"], "patience": 1,
        "args": arguments(folder, processes, facts.get("accumulated", 1), save_strategy="steps", save_steps=6),
        "validation": taught.examples(1, facts.get("turned"), offset=2 * ("turned" in facts)), "progress": False,
    }  # fmt: skip
    bank = train_profiles(model, taught.examples(), **{**settings, **fields})
    return tensors(model), bank


def plain(folder: Path, processes: int) -> dict[str, torch.Tensor]:
    """The Trainer as it is, with our optimizer and collator, on examples in the order of the data."""
    torch.manual_seed(0)
    model = get_peft_model(taught.base(dropout=0.0), taught.config(num_profiles=4, logit_scale=10.0, mask_type="soft"))
    args = arguments(folder, processes, max_steps=5, remove_unused_columns=False, average_tokens_across_devices=False)
    trainer = Trainer(
        model, args, train_dataset=taught.examples(),
        data_collator=ProfileCollator(default_data_collator, list(taught.COUNTS), model=model),
        optimizers=(RowAdamW.for_model(model, lr=1e-2), None),
    )  # fmt: skip
    trainer.train()
    return tensors(model)


def half_way(whole: Path, folder: Path) -> None:
    """A folder as of a run that was killed between its second and its third checkpoint."""
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("metrics.json"))
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.removeprefix("checkpoint-")) > 12:
            shutil.rmtree(checkpoint)


def main(folder: Path) -> None:
    state = PartialState(cpu=True)
    rank = state.process_index
    mine = folder / f"rank{rank}"
    mine.mkdir()
    facts = {"backend": state.backend, "processes": state.num_processes}
    for run in RUNS:
        found, bank = train(run, folder / run, 2)
        save_file(found, mine / f"{run}.safetensors")
        bank.save_pretrained(mine / run)
        facts[run] = bank.metrics
    state.wait_for_everyone()
    if rank == 0:
        half_way(folder / "hard", folder / "resumed")
    state.wait_for_everyone()
    found, bank = train("hard", folder / "resumed", 2, resume=True)
    save_file(found, mine / "resumed.safetensors")
    facts["resumed"] = bank.metrics
    save_file(plain(folder / "plain", 2), mine / "plain.safetensors")
    try:
        train("frozen", folder / "refused", 2, config=taught.config(pool_seed=rank))
    except ConfigError as error:
        facts["refused"] = str(error)
    (mine / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
