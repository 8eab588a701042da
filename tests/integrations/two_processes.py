"""A small real training script, run by test_distributed.py under ``accelerate launch`` and, in part, in one process.

Each process gets an ``output_dir`` of its own: what is found in that of the second was written by the second.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullStateDictConfig, StateDictType, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from peft_xmask import (
    BottleneckConfig,
    MagnitudeMaskConfig,
    WeightAdapterConfig,
    XPEFTCallback,
    XPEFTConfig,
    as_base,
)
from peft_xmask.errors import PeftXMaskError

GLOBAL_BATCH = 8
STEPS = 6
BITS = "base_model.model.mask_table.xpeft_bits.weight"
OVER_LORA = "hard, over a LoRA"
SIZES = dict(task_type="CAUSAL_LM", bottleneck_size=4, modules_to_save=["lm_head"])
CONFIGS = {
    "hard": lambda: XPEFTConfig(**SIZES, num_adapters=20),
    "soft": lambda: XPEFTConfig(**SIZES, num_adapters=20, mask_type="soft"),
    "noisy": lambda: XPEFTConfig(**SIZES, num_adapters=20, gumbel_noise=0.5, estimator="softmax"),
    "bottleneck": lambda: BottleneckConfig(**SIZES),
    "masked": lambda: MagnitudeMaskConfig(
        task_type="CAUSAL_LM", density=0.05, init_weights=False, modules_to_save=["lm_head"]
    ),
    "over weights": lambda: WeightAdapterConfig(
        task_type="CAUSAL_LM", target="weight", r=4, init_weights=False, modules_to_save=["lm_head"]
    ),
    OVER_LORA: lambda: XPEFTConfig(**SIZES, num_adapters=20),
}

LLAMA = LlamaConfig(
    vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
    max_position_embeddings=32, pad_token_id=0,
)  # fmt: skip


class Rows(torch.utils.data.Dataset):
    """A small learnable task: sequences that count up."""

    ids = (torch.arange(64)[:, None] * 7 + torch.arange(6)) % 59 + 1

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def base(config: str = "hard") -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LLAMA).eval()
    if config != OVER_LORA:
        return model
    lora = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return as_base(get_peft_model(model, lora, adapter_name="task"))


def adapted(config: str, rank: int = 0) -> PeftModel:
    """A model that starts differently in each process, as with an unset seed: the processes have to agree on one."""
    model = base(config)
    torch.manual_seed(1 + rank)
    return get_peft_model(model, CONFIGS[config]())


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(input_ids=Rows.ids[:16]).logits
    if isinstance(model, FSDPModule):
        model.reshard()  # the root stays gathered after a forward pass, and optimizers want the shards
    return found


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def train(config: str, folder: Path, *, accumulate: int = 1, resume: Path | None = None, rank: int = 0) -> PeftModel:
    """A run of the Trainer. The global batch is the same however many processes take part."""
    processes = dist.get_world_size() if dist.is_initialized() else 1
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=GLOBAL_BATCH // processes // accumulate, max_steps=STEPS,
        gradient_accumulation_steps=accumulate, learning_rate=1e-2, save_strategy="steps", save_steps=3,
        logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, ddp_find_unused_parameters=False, seed=3,
    )  # fmt: skip
    model = adapted(config, rank)
    callbacks = [XPEFTCallback(resume_from=resume)] if isinstance(CONFIGS[config](), XPEFTConfig) else []
    trainer = Trainer(model, arguments, train_dataset=Rows(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    trainer.save_model()
    return model


def manual_steps(model: nn.Module, rank: int, processes: int, steps: int = 4) -> nn.Module:
    """A training loop without the Trainer, each process on its part of the global batch."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    part = GLOBAL_BATCH // processes
    model.train()
    for step in range(steps):
        first = step * GLOBAL_BATCH + rank * part
        ids = Rows.ids[first : first + part]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def static_graph(config: str, rank: int) -> dict[str, torch.Tensor]:
    """DDP with its strictest settings; chance, such as Gumbel noise, falls otherwise in each process.

    The model has run before, so that values written into the base are there when DDP sends parameters.
    """
    model = adapted(config, rank)
    logits(model)
    model = DistributedDataParallel(model, static_graph=True, find_unused_parameters=False)
    torch.manual_seed(10 + rank)
    manual_steps(model, rank, 2)
    sent = sum(buffer.nbytes for buffer in model.modules_buffers)
    found = {**trained(model.module), "logits": logits(model), "bytes sent a pass": torch.tensor(sent)}
    with model.module.disable_adapter():
        return {**found, "of the base": logits(model)}


def sharded(config: str, folder: Path, rank: int) -> dict[str, torch.Tensor]:
    """FSDP2: every block a unit, the rest, with the mask table, the root's; state gathered before it is saved."""
    model = adapted(config)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert any(parameter.to_local().shape != parameter.shape for parameter in model.parameters())
    found = {"start": logits(model)}
    manual_steps(model, rank, 2)
    found["logits"] = logits(model)
    if config == "hard":
        found["bits"] = get_peft_model_state_dict(model)[BITS]  # what accelerate's adapter-only checkpoints ask for
        arguments = TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True, learning_rate=1e-2)
        state, callback, control = TrainerState(global_step=4), XPEFTCallback(mask_learning_rate=1.0), TrainerControl()
        callback.on_save(arguments, state, control, model=model)
        dist.barrier()
        with torch.no_grad():
            model.masks("default").logits.weight.zero_()
        callback.on_train_begin(arguments, state, control, model=model)
        callback.on_log(arguments, state, control, model=model, logs={"loss": 1.0})
        found["restored"] = logits(model)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(folder / "whole", state_dict=whole)
    return found


def in_fsdp1(model: nn.Module) -> FSDP1:
    policy = ModuleWrapPolicy({LlamaDecoderLayer})
    return FSDP1(model, use_orig_params=True, auto_wrap_policy=policy, device_id=torch.device("cpu"))


def sharded_by_fsdp1(config: str, folder: Path, rank: int) -> dict[str, torch.Tensor]:
    """The older FSDP. PEFT does not find adapters inside its units, so they are saved by a model outside of it."""
    model = in_fsdp1(adapted(config))
    found = {"start": logits(model)}
    manual_steps(model, rank, 2)
    found["logits"] = logits(model)
    with FSDP1.state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig(rank0_only=True)):
        whole = model.state_dict()
    if rank == 0:
        outside = adapted(config)
        outside.load_state_dict(whole)
        outside.save_pretrained(folder)
    return found


def refused_by_fsdp(config: str) -> dict[str, str]:
    """What a method that writes into the base says of a base that is sharded."""
    mesh, found = init_device_mesh("cpu", (2,)), {}

    def with_fsdp2() -> nn.Module:
        model = adapted(config)
        for each in (*model.base_model.model.model.layers, model):
            fully_shard(each, mesh=mesh)
        return model

    for name, build in (("FSDP1", lambda: in_fsdp1(adapted(config))), ("FSDP2", with_fsdp2)):
        try:
            manual_steps(build(), 0, 2, steps=1)
        except PeftXMaskError as error:
            found[name] = str(error)
    return found


def main(folder: Path) -> None:
    state = PartialState(cpu=True)
    rank = state.process_index
    facts: dict[str, object] = {"backend": state.backend, "processes": state.num_processes}
    mine = folder / f"rank{rank}"

    def keep(name: str, found: dict[str, torch.Tensor]) -> None:
        save_file(found, str(mine / f"{name}.safetensors"))

    for config in ("hard", "soft", "bottleneck", "masked", "over weights", OVER_LORA):
        keep(config, trained(train(config, mine / config, rank=rank)))
    state.wait_for_everyone()
    checkpoint = folder / "rank0" / "hard" / "checkpoint-3"
    keep("resumed", trained(train("hard", mine / "resumed", resume=checkpoint, rank=rank)))
    keep("accumulated", trained(train("hard", mine / "accumulated", accumulate=2, rank=rank)))
    for config in ("hard", "noisy", "bottleneck", "masked", "over weights", OVER_LORA):
        keep(f"static-{config}", static_graph(config, rank))
    for config in ("hard", "bottleneck"):
        keep(f"sharded-{config}", sharded(config, folder / f"sharded-{config}", rank))
        keep(f"fsdp1-{config}", sharded_by_fsdp1(config, folder / f"fsdp1-{config}", rank))
    facts["refused"] = {config: refused_by_fsdp(config) for config in ("masked", "over weights")}
    (mine / "facts.json").write_text(json.dumps(facts))
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
