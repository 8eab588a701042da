"""What the tuners that write into base parameters share: which parameters they refuse, and their files."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftConfig
from torch import Tensor, nn

from ...core.fingerprint import in_zero3
from ...errors import ConfigError, FileFormatError, TargetError
from ..base.calls import worth_adapting
from ..base.config import TargetConfig
from ..base.experts import is_fused_experts
from ..base.owners import Owners
from ..base.peft_private import AuxiliaryTrainingWrapper, BaseTunerLayer, set_adapter
from ..base.tuner import TargetTuner
from ..sites.places import module_widths
from .layer import InPlaceLayer
from .named_parameters import named_parameters_of
from .override import sharded_error
from .table import DeltaTable

TABLE = "delta_table"
"""Attribute of the base model's root that holds the table."""


class InPlaceTuner(TargetTuner):
    """Base of the tuners whose adapters are added to base parameters.

    A subclass names its ``table_cls`` too; its ``layer_cls`` is an
    :class:`~peft_xmask.tuners.in_place.layer.InPlaceLayer`.
    """

    layer_cls: type[InPlaceLayer]
    table_cls: type[DeltaTable]
    _injecting_now = False

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Restore the original parameters first, since targets are checked by their values."""
        for module in model.modules():
            if isinstance(module, InPlaceLayer) and not module.merged:
                module.sync(())
        super()._prepare_model(peft_config, model)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        """Resolve ``target_modules=None``: no modules, where parameters are named."""
        if peft_config.target_modules is None and peft_config.target_parameters:
            peft_config.target_modules = set()
        return super()._prepare_adapter_config(peft_config, model_config)

    def _find_targets(self, config: TargetConfig, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The targeted base modules by name, in the model's order, those of named parameters among them.

        Raises:
            TargetError: see :func:`~peft_xmask.tuners.in_place.named_parameters.named_parameters_of`; or a module is
                targeted as a whole too.
        """
        found = dict(super()._find_targets(config, model))
        named = named_parameters_of(model, config.target_parameters or ())
        for name, (module, parameters) in named.items():
            if name in found:
                raise TargetError(
                    f"'{name}' is in target_modules, which adapts it as a whole, and target_parameters names its "
                    f"{parameters[0]}. Leave it out of one of them; target_modules=[] targets no module."
                )
            found[name] = module
            self._injection.named[name] = parameters
        order = {name: index for index, (name, _) in enumerate(model.named_modules())}
        return sorted(found.items(), key=lambda each: order[each[0]])

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """What PEFT calls after the modules: wrap the modules of named parameters. Returns the parameters' names."""
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            for name in self._injection.named:
                parent, _, last = name.rpartition(".")
                target = model.get_submodule(name)
                self._create_and_replace(peft_config, adapter_name, target, last, model.get_submodule(parent), name)
        return [f"{name}.{each}" for name, parameters in self._injection.named.items() for each in parameters]

    def _is_first(self, adapter_name: str) -> bool:
        """Whether no layer has got its part of an adapter yet."""
        return not hasattr(self.model, TABLE) or adapter_name not in self.table.holders

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters as PEFT does, but find the modules in one walk instead of two.

        The walks take longer than the rest of a switch.
        """
        with self._changing_state(adapter_name, None):
            found = _Found(self.model, (AuxiliaryTrainingWrapper, self.tuner_layer_cls))
            set_adapter(found, adapter_name, inference_mode=inference_mode, layer_cls=self.tuner_layer_cls)
            self.active_adapter = adapter_name

    def enable_adapter_layers(self) -> None:
        """Enable the active adapters."""
        with self._changing_state(None, False):
            super().enable_adapter_layers()

    def disable_adapter_layers(self) -> None:
        """Disable all adapters."""
        with self._changing_state(None, True):
            super().disable_adapter_layers()

    @contextmanager
    def _changing_state(self, names: str | list[str] | None, disabled: bool | None) -> Iterator[None]:
        """Change the state of all layers, one thread at a time, and record what this thread asked for.

        Args:
            names: the active adapters; None: not changed.
            disabled: whether adapters are disabled; None: not changed.
        """
        table = getattr(self.model, TABLE, None)
        if not isinstance(table, DeltaTable) or self._injecting_now:
            yield
            return
        with table.guard.changing_state:
            now = table.state
            wanted = now[0] if names is None else (names,) if isinstance(names, str) else tuple(names)
            (table.guard.note_switch if disabled is None else table.guard.note_toggle)()
            yield
            table.guard.note_state((wanted, now[1] if disabled is None else disabled))

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, or leave the model unchanged on an error."""
        self._injecting_now = True
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            self._injecting_now = False

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Pass ``adapter_names``, one name per example of the batch, to the layers."""
        named = self.table.guard.names_given() if kwargs.get("adapter_names") is not None else nullcontext()
        with named, super()._enable_peft_forward_hooks(*args, **kwargs):
            yield

    @property
    def table(self) -> DeltaTable:
        """The model's table of adapters."""
        table: DeltaTable = getattr(self.model, TABLE)
        return table

    def _make_table(self) -> None:
        """Create the table at the first target; earlier, PEFT has not yet frozen the base."""
        if not hasattr(self.model, TABLE):
            table = self.table_cls()
            table.train(self.model.training)
            setattr(self.model, TABLE, table)
            table.hooks = [
                self.model.register_forward_pre_hook(_begin_pass),
                self.model.register_forward_hook(_end_pass),
            ]

    def _check_targets(self, model: nn.Module, found: list[tuple[str, nn.Module]], names: list[list[str]]) -> None:
        """Refuse parameters whose change in place would have side effects.

        Args:
            names: of the parameters of each target.

        Raises:
            ConfigError: the base model has an attribute where the table would be.
            TargetError: a target without such a parameter, or one that is on the meta device, shared with another
                module, or computed from other parameters.
        """
        present = getattr(model, TABLE, None)
        if present is not None and not isinstance(present, DeltaTable):
            raise ConfigError(
                f"The base model has an attribute '{TABLE}' of its own ({type(present).__name__}), where adapters keep "
                "what they add. Wrap the model in another module."
            )
        owners = Owners(model)
        for (name, layer), own in zip(found, names, strict=True):
            if not own:
                raise TargetError(
                    f"Module '{name}' is a {type(layer).__name__} without a weight of its own, which cannot be "
                    "adapted. Change target_modules or exclude_modules."
                )
            for parameter_name in own:
                parameter = getattr(layer, parameter_name)
                if parameter_name not in layer._parameters:
                    raise TargetError(
                        f"The {parameter_name} of '{name}' is computed from other parameters in each forward pass (a "
                        "parametrization, such as weight norm or spectral norm), so what is written into it would be "
                        "lost. Remove the parametrization first (torch.nn.utils.parametrize.remove_parametrizations, "
                        "remove_weight_norm, remove_spectral_norm), or add the module to exclude_modules."
                    )
                if in_zero3(parameter):  # by from_pretrained
                    raise sharded_error(parameter_name, layer)
                if parameter.is_meta:
                    raise TargetError(
                        f"The {parameter_name} of '{name}' is on the meta device: there are no values to start from. "
                        "Load the base's weights first (low_cpu_mem_usage concerns the adapter's alone)."
                    )
                others = owners.besides(name, parameter)
                if others:
                    raise TargetError(
                        f"The {parameter_name} of '{name}' is shared with '{others[0]}' (tied weights): changed in "
                        "place, it would change there too, and its gradient would lack that part. Load the base with "
                        "tie_word_embeddings=False, or add the module to exclude_modules."
                    )

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """The adapted modules' own parameters, named as in a PeftModel.

        Every process has loaded them, so DDP need not send them. It must not either: an adapter's values may be written
        into them, and processes have different values until DDP has sent the adapter.
        """
        return [
            f"base_model.{name}.base_layer.{parameter_name}"
            for name, module in self.named_modules()
            if isinstance(module, InPlaceLayer)
            for parameter_name, _ in module.base_layer.named_parameters()
        ]

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Trainable values are float32 from the start. Without PEFT's autocast they take the base's dtype instead."""
        if autocast_adapter_dtype:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        elif adapter_name in self.table.holders:
            layers = (module for module in self.model.modules() if isinstance(module, InPlaceLayer))
            self.table.holders[adapter_name].to(next(layers).dtype)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        layers = [module for module in self.model.modules() if isinstance(module, InPlaceLayer)]
        for layer in layers:
            layer.release(restore=not merge)
        model: Any = super()._unload_and_optionally_merge(merge, *args, **kwargs)  # type: ignore[func-returns-value]
        if hasattr(model, TABLE):
            for hook in getattr(model, TABLE).hooks:
                hook.remove()
            delattr(model, TABLE)
        return model

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """The saved state: the adapter's vector, in its storage dtype."""
        entries = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        table = find_table(model)
        ending = f"{TABLE}.{table.state_name}.{adapter_name}.weight"
        vector = table[adapter_name]
        return {key: vector.stored(entry) for key, entry in entries.items() if key.endswith(ending)}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check a file's vector before any tensor reaches the model."""
        table = find_table(model)
        ending = f"{TABLE}.{table.state_name}.weight"
        key = next((key for key in state_dict if key.endswith(ending)), None)
        if key is None:
            raise FileFormatError(
                f"Expected '{ending}' in the adapter file, found {sorted(state_dict) or 'nothing'}. It is damaged."
            )
        state_dict = {**state_dict, key: table[adapter_name].check_stored(state_dict[key])}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _begin_pass(model: nn.Module, _: Any) -> None:
    table = model._modules.get(TABLE)
    if isinstance(table, DeltaTable) and not torch.compiler.is_compiling():
        if table.probe is not None:  # before a pass, since FSDP2 shows whole parameters during it
            table.probe.refuse_sharded()
        table.guard.begin_pass(lambda: table.state)


def _end_pass(model: nn.Module, *_: Any) -> None:
    table = model._modules.get(TABLE)
    if isinstance(table, DeltaTable) and not torch.compiler.is_compiling():
        table.guard.end_pass()


class _Found:
    """Stands in for a model where PEFT calls ``modules()``: gives only the modules of some classes."""

    def __init__(self, model: nn.Module, classes: tuple[type, ...]) -> None:
        seen, kinds = {model}, {}
        queue, self._found = [model], []
        for module in queue:
            kind = type(module)
            if kind not in kinds:
                kinds[kind] = issubclass(kind, classes)
            if kinds[kind]:
                self._found.append(module)
            for child in module._modules.values():
                if child is not None and child not in seen:
                    seen.add(child)
                    queue.append(child)

    def modules(self) -> list[nn.Module]:
        return self._found


def find_table(model: nn.Module) -> DeltaTable:
    """The table inside a model, wrapped by PEFT or not.

    Raises:
        ConfigError: the model has none.
    """
    for module in model.modules():
        if isinstance(module, DeltaTable):
            return module
    raise ConfigError(f"Expected a model with an adapter written in place, found a {type(model).__name__} without one.")


def linear_layers_of_blocks(model: nn.Module) -> str | None:
    """A regular expression of every linear layer, and all fused experts, inside the model's lists of blocks.

    None if there are none.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    inside: tuple[str, ...] = ()
    found: dict[str, set[str]] = defaultdict(set)
    chosen, others = set(), []
    for name, module in model.named_modules():
        if name.startswith(inside or ("\0",)):
            continue
        others.append(name)
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{name}.")
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        owner = min((each for each in lists if name.startswith(f"{each}.")), key=len, default=None)
        linear = module_widths(layer) is not None and hasattr(layer, "weight")  # some wrap their linear layer
        if owner is None or not (linear or is_fused_experts(layer)):
            continue
        if not worth_adapting(model, {name}):
            continue
        _, _, rest = name.removeprefix(f"{owner}.").partition(".")
        if rest:
            found[owner].add(re.escape(rest))
            chosen.add(name)
    if not found:
        return None
    short: dict[str, set[str]] = defaultdict(set)
    for owner, rests in found.items():
        short[owner.rpartition(".")[2]] |= rests
    expression = _modules_in_lists(short)  # fits other models around the same blocks
    if any(name not in chosen and re.fullmatch(expression, name) for name in others):
        return _modules_in_lists(found)
    return expression


def _modules_in_lists(names: dict[str, set[str]]) -> str:
    """A regular expression of modules by the name of a list and their own names (escaped) behind its index."""
    lists = (rf"{re.escape(owner)}\.\d+\.(?:{'|'.join(sorted(rests))})" for owner, rests in sorted(names.items()))
    return rf"(?:.*\.)?(?:{'|'.join(lists)})"


def parameter_names(module: nn.Module, *, bias: bool) -> list[str]:
    """Names of the floating point parameters of a module that an adapter changes: weight, and bias if wanted.

    Of fused experts: all parameters, and those with a bias in their name if wanted.
    """
    if is_fused_experts(module):
        found = {name: each for name, each in module._parameters.items() if bias or "bias" not in name}
    else:
        found = {name: getattr(module, name, None) for name in (["weight", "bias"] if bias else ["weight"])}
    return [name for name, each in found.items() if isinstance(each, Tensor) and torch.is_floating_point(each)]
