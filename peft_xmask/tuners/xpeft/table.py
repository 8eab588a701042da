"""The mask table: every mask of a model, in one place at its root."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, MutableMapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...errors import ConfigError
from ..base.peft_private import BaseTunerLayer, current_graph_task
from ..base.state import PackedTensor, RootTable, TrainableTensor
from .keys import BITS, GAIN, GAIN_BITS, LOGITS, OFFSET_BITS, PARTS, TABLE, ending
from .masks import AdapterMasks, Names
from .mixing import ActiveAdapters
from .passes import OF_THREAD, BatchRows, ForwardPass

_KEPT_BACKWARDS = 16
_BACKWARDS = threading.Lock()


class XPEFTModule(BaseTunerLayer):
    """What PEFT visits when it sets, enables or deletes an X-PEFT adapter: the sites and the table."""


class MaskTable(RootTable, XPEFTModule):
    """The masks of one model.

    Its modules, which PEFT walks, hold tensors only. What else belongs to an adapter is in :attr:`adapters`.

    Attributes:
        adapters: by name.
        hooks: of the model's root, where forward passes begin and end, and of its head.
        offset_hook: that of the head, where profiles have offsets.
    """

    xpeft_logits: MutableMapping[str, TrainableTensor]
    xpeft_gain: MutableMapping[str, TrainableTensor]
    xpeft_bits: MutableMapping[str, PackedTensor]
    xpeft_gain_bits: MutableMapping[str, PackedTensor]
    xpeft_offset_bits: MutableMapping[str, PackedTensor]
    adapter_layer_names = PARTS
    instead_of_lora = "Use export_lora(model, folder), which writes a linear adapter as a LoRA exactly."

    def __init__(self) -> None:
        super().__init__()
        for name in PARTS:
            self.add_module(name, nn.ModuleDict())
        self.adapters: dict[str, AdapterMasks] = {}
        self.hooks: list[RemovableHandle] = []
        self.offset_hook: RemovableHandle | None = None
        self._last: ForwardPass | None = None
        self._backwards: dict[int, weakref.ref[ForwardPass]] = {}

    def add(self, masks: AdapterMasks) -> None:
        """Enter an adapter, or another one in its place."""
        parts = {LOGITS: masks.logits, GAIN: masks.gain, BITS: masks.bits, GAIN_BITS: masks.gain_bits}
        for part, holder in {**parts, OFFSET_BITS: masks.offset_bits}.items():
            if holder is not None:
                getattr(self, part)[masks.name] = holder
            elif masks.name in getattr(self, part):
                del getattr(self, part)[masks.name]
        self.adapters[masks.name] = masks

    def serve(
        self,
        adapter_name: str,
        bits: Tensor,
        gain_bits: Tensor | None,
        names: Names,
        offset_bits: Tensor | None = None,
    ) -> None:
        """Let an adapter that is not trained have these bytes, and names for their rows. Nothing is copied.

        A call of the model that has begun ends with the bytes it began with.
        """
        masks = self.adapters[adapter_name]
        spec = replace(masks.spec, num_profiles=len(bits))
        self.add(masks.serving(bits, gain_bits, spec, names, offset_bits))

    def active(self, adapter_name: str) -> ActiveAdapters:
        """The mixed adapters of the forward pass at hand. Every site asks; only the first one has to find them."""
        now = OF_THREAD.now
        if now is not None and now.table is self:
            found = now.active.get((adapter_name, torch.is_grad_enabled()))
            if found is not None:
                return found
        now = self._pass()
        return self._masks(adapter_name, now).active(now)

    def offsets(self, adapter_name: str) -> Tensor | None:
        """Offsets of the forward pass at hand: float32 ``[B, C]``, or ``[1, C]`` for whole batches; None without any.

        Raises:
            ConfigError: an adapter of several profiles, and none was chosen.
            MaskFormatError: offsets that are not finite.
        """
        now = self._pass()
        masks = self._masks(adapter_name, now) if adapter_name in self.adapters else None
        return None if masks is None else masks.offsets(now)

    def _masks(self, adapter_name: str, now: ForwardPass) -> AdapterMasks:
        batch = now.batch
        chosen = batch is not None and batch.masks.name == adapter_name
        return batch.masks if batch is not None and chosen else self.adapters[adapter_name]  # type: ignore[return-value]

    def _pass(self) -> ForwardPass:
        """The forward pass at hand; one of its own for a site that runs outside of any."""
        now = OF_THREAD.now
        if now is not None and now.table is self:
            return now
        return self._run_again() or ForwardPass(self, self._batch(), learns=torch.is_grad_enabled())

    def _run_again(self) -> ForwardPass | None:
        """The pass of a checkpointed block that runs again in backward; None for anything else."""
        if torch.compiler.is_dynamo_compiling():
            return self._last if self.training else None
        task = current_graph_task()
        if task < 0:
            return None
        found = self._backwards.get(task)
        return self._last if found is None else found()

    def _batch(self) -> BatchRows | None:
        batch = OF_THREAD.batch
        return batch if batch is not None and batch.table is self else None

    def begin(self, inputs: list[Any]) -> None:
        """Begin a forward pass.

        Raises:
            ConfigError: rows were chosen for this call, and no input has as many examples.
        """
        batch = self._batch()
        if batch is not None:
            _check_batch(batch, inputs)
        now = ForwardPass(self, batch, learns=torch.is_grad_enabled())
        now.outer, OF_THREAD.now = OF_THREAD.now, now
        learns = self.training and now.learns
        if learns:
            self._last = now
        if (learns or torch.compiler.is_dynamo_compiling()) and not (self.disable_adapters or self.merged):
            for name in self.active_adapters:  # before any block: one that is checkpointed must do the same each time
                if name in self.adapters:
                    self.active(name)

    def end(self, output: Any) -> None:
        """End the forward pass that :meth:`begin` began."""
        now = OF_THREAD.now
        if now is None or now.table is not self:
            return
        OF_THREAD.now = now.outer
        if now.learns and not torch.compiler.is_dynamo_compiling():
            self._remember(now, output)

    def _remember(self, now: ForwardPass, output: Any) -> None:
        """Let a checkpointed block that runs again in backward find its pass: the backward pass begins at the output.

        The pass lives as long as the output's graph.
        """

        def begin_backward(_: Tensor) -> None:
            with _BACKWARDS:
                self._backwards[current_graph_task()] = weakref.ref(now)
                while len(self._backwards) > _KEPT_BACKWARDS:
                    del self._backwards[min(self._backwards)]

        for tensor in _tensors(output):
            if tensor.grad_fn is not None:
                tensor.register_hook(begin_backward)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter."""
        super().delete_adapter(adapter_name)
        self.adapters.pop(adapter_name, None)

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to passes of the original."""
        return {**self.__dict__, "_last": None, "_backwards": {}}


def begin_forward(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the base model's root."""
    table: MaskTable = getattr(root, TABLE)
    table.begin([*args, *kwargs.values()])


def end_forward(root: nn.Module, _: Any, output: Any) -> None:
    """Forward hook of the base model's root."""
    table: MaskTable = getattr(root, TABLE)
    table.end(output)


def load_served_state(root: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Pre-hook of the root's ``load_state_dict``: give a model that trains the state of one that serves.

    The other model has bytes where this one has logits, for example in ``SentenceTransformerTrainer``, which loads a
    checkpoint as a new model and copies its state. Logits are rebuilt from the bytes, as for a file.

    Raises:
        MaskFormatError: the bytes are not those of valid masks.
    """
    table: MaskTable = getattr(root, TABLE)
    for name, masks in table.adapters.items():
        keys = {part: prefix + ending(part, name) for part in PARTS}
        bits, gain_bits = state_dict.get(keys[BITS]), state_dict.get(keys[GAIN_BITS])
        if not masks.is_trained or bits is None or keys[LOGITS] in state_dict or not bits.any():
            continue
        masks.spec.check(bits, gain_bits)
        logits, gain = masks.form.unpack(bits, gain_bits)
        state_dict[keys[LOGITS]], state_dict[keys[BITS]] = logits, torch.zeros_like(bits)
        if gain is not None and gain_bits is not None:
            state_dict[keys[GAIN]], state_dict[keys[GAIN_BITS]] = gain, torch.zeros_like(gain_bits)
        masks.rebuilt = True


def find_table(model: nn.Module) -> MaskTable:
    """The mask table inside a model, wrapped by PEFT or not.

    Raises:
        ConfigError: the model has none.
    """
    for module in model.modules():
        if isinstance(module, MaskTable):
            return module
    raise ConfigError(f"Expected a model with an X-PEFT adapter, found a {type(model).__name__} without one.")


def _check_batch(batch: BatchRows, inputs: list[Any]) -> None:
    sizes = [x.shape[0] for x in inputs if isinstance(x, Tensor) and x.dim() > 0]
    count = batch.rows.shape[0]
    if sizes and not any(size == count * batch.beams for size in sizes):
        raise ConfigError(
            "Expected one row in `adapter_names` for each example of the batch, but got "
            f"{count} and {sizes[0] // batch.beams} respectively."
        )


def _tensors(output: Any) -> Iterator[Tensor]:
    """Tensors in what a model returns: a tensor, a list, a dictionary or an object with attributes."""
    if isinstance(output, Tensor):
        yield output
        return
    if isinstance(output, dict):
        parts = list(output.values())
    elif isinstance(output, (list, tuple)):
        parts = list(output)
    else:
        parts = list(getattr(output, "__dict__", {}).values())
    for part in parts:
        yield from _tensors(part) if isinstance(part, (Tensor, dict, list, tuple)) else ()
