"""One run over many profiles: the model with a row for each, its head, and the Trainer that moves them."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import TrainingArguments

from ..bank.bank import ProfileBank
from ..bank.names import NameIndex
from ..bank.storage import BITS, GAIN_BITS
from ..core.files import read_tensors, write_tensors
from ..errors import ConfigError
from ..tuners.xpeft import XPEFTConfig
from ..tuners.xpeft.model import find_table
from ..tuners.xpeft.table import MaskTable
from . import distributed as ranks
from .best_rows import BestRows
from .collator import ProfileCollator
from .evaluation import Evaluator
from .row_adamw import RowAdamW, hide_rows
from .sampler import ProfileBatchSampler
from .trainer import BarCallback, ProfilesCallback, ProfileTrainer

HEAD_FILE = "head.safetensors"


@dataclass(frozen=True)
class JointRun:
    """What is trained, on what and how.

    Attributes:
        model: its adapter's row i is that of ``index.name(i)``.
        name: of that adapter.
        settings: what tells this run from others, as JSON can hold it.
    """

    model: PeftModel
    name: str
    index: NameIndex
    dataset: Any
    collator: ProfileCollator
    sampler: ProfileBatchSampler
    args: TrainingArguments
    settings: dict[str, Any]
    progress: bool

    @property
    def table(self) -> MaskTable:
        """The mask table of the model."""
        return find_table(self.model)

    @property
    def run(self) -> str:
        """The settings as one string."""
        return json.dumps(self.settings)

    def packed(self) -> tuple[Tensor, Tensor | None]:
        """The masks as they are now, as they are shipped."""
        gain = self.table.xpeft_gain[self.name].weight if self.name in self.table.xpeft_gain else None
        bits, gain_bits = self.table.pack(self.name, self.table.xpeft_logits[self.name].weight, gain)
        return bits.cpu(), None if gain is None else gain_bits.cpu()

    def head(self) -> dict[str, nn.Parameter]:
        """Parameters that PEFT trains beside the masks."""
        found = dict(self.model.named_parameters())
        return {key: found[key] for key in found if f".modules_to_save.{self.name}." in key}

    def train_head(self, epochs: int, learning_rate: float) -> None:
        """Train the head on the base alone, or take it from a run of the same settings that did."""
        head = self.head()
        if not head:
            raise ConfigError(
                "Expected a model with a head, which head='first' trains; found none. Pass a task_type such as "
                "'SEQ_CLS' in the config, or head='frozen'."
            )
        assert self.args.output_dir is not None
        path = Path(self.args.output_dir) / HEAD_FILE
        if path.is_file():
            tensors, metadata = read_tensors(path)
            if metadata.get("run") == self.run and tensors.keys() == head.keys():
                with torch.no_grad():
                    for key, parameter in head.items():
                        parameter.copy_(tensors[key])
                return
        args = copy.copy(self.args)
        args.num_train_epochs, args.save_strategy = epochs, "no"  # type: ignore[assignment]
        rows = [holder.weight for part in (self.table.xpeft_logits, self.table.xpeft_gain) for holder in part.values()]
        for parameter in (*rows, *head.values()):
            parameter.requires_grad_(any(parameter is each for each in head.values()))
        hide_rows(self.model)
        optimizer = torch.optim.AdamW(head.values(), lr=learning_rate, weight_decay=args.weight_decay)
        self._trainer(args, self._on_the_base, optimizer, [BarCallback("head")]).train()
        for parameter in (*rows, *head.values()):
            parameter.requires_grad_(any(parameter is each for each in rows))
        if ranks.number() == 0:
            write_tensors(path, head, {"run": self.run})

    def train(
        self, evaluator: Evaluator | None, patience: int | None, head_learning_rate: float, checkpoint: Path | None
    ) -> BestRows:
        """Train the rows, and the head if it has gradients, from a checkpoint if there is one; the best rows."""
        best = BestRows(*self.packed(), patience)
        keeping = ProfilesCallback(self.table, self.name, self.sampler, best, evaluator, self.run, self.packed)
        optimizer = RowAdamW.for_model(
            self.model,
            lr=self.args.learning_rate,
            other_lr=head_learning_rate,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
            weight_decay=self.args.weight_decay,
        )
        trainer = self._trainer(self.args, self.collator, optimizer, [keeping, BarCallback("profiles", best)])
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return best

    def _on_the_base(self, examples: list[dict[str, Any]]) -> Any:
        batch = self.collator(examples)
        batch["adapter_names"] = torch.full_like(batch["adapter_names"], -1)
        return batch

    def _trainer(self, args: TrainingArguments, collator: Any, optimizer: Any, callbacks: list[Any]) -> ProfileTrainer:
        shown = self.progress and ranks.number() == 0
        return ProfileTrainer(
            self.model,
            args,
            data_collator=collator,
            train_dataset=self.dataset,
            optimizers=(optimizer, None),
            callbacks=[each for each in callbacks if shown or not isinstance(each, BarCallback)],
            batch_sampler=self.sampler,
        )


def with_rows(
    model: nn.Module, config: XPEFTConfig | None, bank: ProfileBank | None, index: NameIndex, *, logit_scale: float
) -> tuple[PeftModel, str]:
    """The model with a row for each profile, and the name of the adapter.

    Raises:
        ConfigError: a PeftModel without such rows.
        BaseMismatchError, PoolMismatchError: the bank is of another base or pool.
    """
    if isinstance(model, PeftModel):
        name = model.active_adapter
        table = find_table(model)
        if bank is not None or config is not None:
            raise ConfigError("Expected the base model with config= or bank=, found a PeftModel.")
        if name not in table.specs or not table.is_trained(name) or table.specs[name].num_profiles != len(index):
            raise ConfigError(
                f"Expected an active X-PEFT adapter that is trained and has num_profiles={len(index)}, as many as the "
                f"dataset has profiles; found '{name}'. Pass the base model and config= instead."
            )
        table.rescale_logits(name, logit_scale)
        model.peft_config[name].logit_scale = logit_scale  # type: ignore[attr-defined]
        return model, name
    if config is None:
        config = XPEFTConfig(task_type="SEQ_CLS") if bank is None else bank.config
    config = copy.copy(config)
    config.num_profiles, config.inference_mode, config.logit_scale = len(index), False, logit_scale
    if bank is not None:
        config.expected_base_fingerprint = config.base_fingerprint
        config.expected_pool_fingerprint = config.pool_fingerprint
    adapted = get_peft_model(model, config)
    if bank is not None:
        _start_from(adapted, find_table(adapted), "default", bank, index)
    return adapted, "default"


def _start_from(model: PeftModel, table: MaskTable, name: str, bank: ProfileBank, index: NameIndex) -> None:
    """The bank's head, and its masks for the profiles it has."""
    logits = table.xpeft_logits[name].weight
    gain = table.xpeft_gain[name].weight if name in table.xpeft_gain else None
    bits, gain_bits = table.pack(name, logits, gain)
    known = {row: bank[each] for row, each in enumerate(index) if each in bank}
    for row, profile in known.items():
        bits[row] = profile.bits
        if profile.gain_bits is not None:
            gain_bits[row] = profile.gain_bits
    state = {**bank.shared, BITS: bits, **({} if gain is None else {GAIN_BITS: gain_bits})}
    set_peft_model_state_dict(model, state, adapter_name=name)
    table.rebuilt.discard(name)
    new = torch.tensor([row not in known for row in range(len(index))])
    with torch.no_grad():
        for weight in table.xpeft_logits[name].parameters():
            weight[new] = 0
        for weight in table.xpeft_gain[name].parameters() if gain is not None else ():
            weight[new] = 0
