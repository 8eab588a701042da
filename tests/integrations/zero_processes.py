"""DeepSpeed's ZeRO, run by test_deepspeed.py under ``torchrun``: two gloo processes on CPUs."""

import json
import sys
from pathlib import Path

import deepspeed
import torch
import two_processes as plain
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from transformers.integrations import HfDeepSpeedConfig

from peft_xmask import XPEFTCallback
from peft_xmask.errors import PeftXMaskError

IN_PLACE = ("masked", "over weights")


def config_of(stage: int, clipping: float = 0.0) -> dict[str, object]:
    return {
        "train_micro_batch_size_per_gpu": plain.GLOBAL_BATCH // 2,
        "gradient_clipping": clipping,  # 1 is DeepSpeed's default
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "stage3_gather_16bit_weights_on_model_save": True,  # the Trainer needs it to save
            "stage3_param_persistence_threshold": 0,  # shard parameters as small as these too
        },
    }


def start(model: nn.Module, stage: int) -> deepspeed.DeepSpeedEngine:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config_of(stage))[0]


def steps(engine: deepspeed.DeepSpeedEngine, rank: int, count: int = 4) -> None:
    """As ``plain.manual_steps``."""
    part = plain.GLOBAL_BATCH // 2
    engine.train()
    for step in range(count):
        first = step * plain.GLOBAL_BATCH + rank * part
        ids = plain.Rows.ids[first : first + part]
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()


def logits(engine: deepspeed.DeepSpeedEngine) -> torch.Tensor:
    engine.eval()  # returns None
    with torch.no_grad():
        return engine(input_ids=plain.Rows.ids[:16]).logits


def whole(model: nn.Module) -> deepspeed.zero.GatheredParameters:
    return deepspeed.zero.GatheredParameters([p for p in model.parameters() if p.requires_grad])


def said_of(call) -> str:
    try:
        call()
    except PeftXMaskError as error:
        return str(error)
    return ""


def by_hand(config: str, stage: int, folder: Path, rank: int) -> tuple[dict[str, torch.Tensor], str]:
    """Four steps of the engine; what it gives then, and what saving without gathering says."""
    model = plain.adapted(config)
    engine = start(model, stage)
    steps(engine, rank)
    said = said_of(lambda: model.save_pretrained(folder / "parts", is_main_process=rank == 0))
    found = {"logits": logits(engine)}  # after this small parameters stay gathered
    with whole(model):
        model.save_pretrained(folder / "whole", is_main_process=rank == 0)
        found |= {name: each.clone() for name, each in plain.trained(model).items()}
    return found, said


def from_a_sharded_base(config: str, base: Path, folder: Path, rank: int) -> tuple[dict[str, torch.Tensor], str]:
    """With a base that ``from_pretrained`` shards while it loads it."""
    kept = HfDeepSpeedConfig(config_of(3))  # noqa: F841  # for as long as it lives
    model = LlamaForCausalLM.from_pretrained(base).eval()
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    torch.manual_seed(1)
    made: list[nn.Module] = []
    said = said_of(lambda: made.append(get_peft_model(model, plain.CONFIGS[config]())))
    if not made:
        return {}, said
    engine = start(made[0], 3)
    said = said_of(lambda: steps(engine, rank))
    if said:
        return {}, said
    with whole(made[0]):
        made[0].save_pretrained(folder, is_main_process=rank == 0)
    return {"logits": logits(engine)}, said


def trainer(config: str, stage: int, folder: Path, resume: Path | None = None) -> dict[str, torch.Tensor]:
    """What a run of the Trainer trains; ``resume``: from this checkpoint."""
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=plain.GLOBAL_BATCH // 2, max_steps=plain.STEPS,
        learning_rate=1e-2, save_strategy="steps", save_steps=3, logging_steps=1, report_to=[], disable_tqdm=True,
        use_cpu=True, seed=3, deepspeed=config_of(stage, clipping=1.0),
    )  # fmt: skip
    model = plain.adapted(config)
    callbacks = [XPEFTCallback(resume_from=resume)] if config == "hard" else []
    run = Trainer(model, arguments, train_dataset=plain.Rows(), callbacks=callbacks)
    run.train(resume_from_checkpoint=str(resume) if resume else None)
    run.save_model()
    with whole(model):
        return {name: each.clone() for name, each in plain.trained(model).items()}


def main(folder: Path) -> None:
    deepspeed.init_distributed("gloo")
    rank = torch.distributed.get_rank()
    mine = folder / f"rank{rank}"
    facts: dict[str, dict[str, str]] = {"parts": {}, "refused": {}, "sharded base": {}}
    base = folder / "base"
    if rank == 0:
        plain.base().save_pretrained(base)
    torch.distributed.barrier()

    def keep(name: str, found: dict[str, torch.Tensor]) -> None:
        mine.mkdir(exist_ok=True)
        save_file({key: each.contiguous() for key, each in found.items()}, str(mine / f"{name}.safetensors"))

    for stage in (2, 3):
        for config in ("hard", "soft", "bottleneck", *(IN_PLACE if stage == 2 else ())):
            name = f"{config}-{stage}"
            found, facts["parts"][name] = by_hand(config, stage, folder / name, rank)
            keep(name, found)
        for config in ("hard", "bottleneck"):
            name = f"trainer-{config}-{stage}"
            keep(name, trainer(config, stage, folder / name))
        torch.distributed.barrier()
        checkpoint = folder / f"trainer-hard-{stage}" / "checkpoint-3"
        keep(f"resumed-{stage}", trainer("hard", stage, folder / f"resumed-{stage}", checkpoint))
    for config in IN_PLACE:
        facts["refused"][config] = said_of(lambda config=config: steps(start(plain.adapted(config), 3), rank, 1))
    for config in ("hard", "bottleneck", *IN_PLACE):
        name = f"sharded-{config}"
        found, facts["sharded base"][config] = from_a_sharded_base(config, base, folder / name, rank)
        if found:
            keep(name, found)
    (mine / "facts.json").write_text(json.dumps(facts))
    torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
