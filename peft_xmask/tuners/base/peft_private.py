"""The only file that uses PEFT's private names.

PEFT has no plugin discovery, so importing :mod:`peft_xmask` adds its types to PEFT's enum and tables. Everything of
PEFT that is not documented API is imported from here, and a test checks that each name still exists.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import peft.mixed_model
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraLayer, variants
from peft.tuners.mixed import COMPATIBLE_TUNER_TYPES
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _get_tuner_state_dict_key_prefixes,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
    check_target_module_exists,
    onload_layer,
    set_adapter,
)
from peft.utils import PeftType, register_peft_method
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import resolve_quantization_backend

from ...errors import PeftXMaskWarning

__all__ = [
    "COMPATIBLE_TUNER_TYPES",
    "DUMMY_TARGET_MODULES",
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "LoraLayer",
    "accept_rows",
    "add_member",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "current_graph_task",
    "include_all_linear_layers",
    "onload_layer",
    "peft_type",
    "quantisation_backend",
    "refuse_in_mixed_models",
    "register",
    "set_adapter",
    "tuner_key_prefixes",
]

include_all_linear_layers = _maybe_include_all_linear_layers
tuner_key_prefixes = _get_tuner_state_dict_key_prefixes


def current_graph_task() -> int:
    """The number of the backward pass that this thread is running; -1 if it runs none."""
    return int(torch._C._current_graph_task_id())


def quantisation_backend(module: Any) -> Any:
    """PEFT's backend that reads a module's quantised weight; None if the module is not quantised."""
    return resolve_quantization_backend(module, get_apply_tensor_subclass=_cannot_quantise)


def _cannot_quantise() -> Any:
    """Stands in for the function with which torchao would write a weight; we only read."""
    raise TypeError("Weights are only read.")


def add_member(enum: Any, name: str) -> Any:
    """Add ``name`` to a string enum as a member whose value is its name; return an existing one.

    Works on Python 3.10 to 3.13: builds the member by hand and enters it into the enum's tables.
    """
    if name in enum._member_map_:
        return enum._member_map_[name]
    member = str.__new__(enum, name)
    member._name_ = name
    member._value_ = name
    member._sort_order_ = len(enum._member_names_)
    enum._member_map_[name] = member
    enum._value2member_map_[name] = member
    enum._member_names_.append(name)
    type.__setattr__(enum, name, member)
    return member


def peft_type(name: str) -> Any:
    """The :class:`peft.PeftType` member called ``name``, added if PEFT does not have it."""
    return add_member(PeftType, name)


def register(name: str, config_cls: type, model_cls: type) -> bool:
    """Register a method with PEFT. Calling this twice is harmless.

    Args:
        name: lower-case name; the prefix of its state is ``name_``.

    Returns:
        Whether PEFT now uses our classes. False, with a warning, if PEFT or another package already has a method of
        that name.
    """
    member = peft_type(name.upper())
    present = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if present is None:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
        return True
    if present.__module__.partition(".")[0] == "peft_xmask":
        return True
    warnings.warn(
        f"PEFT already has a method '{name}' from {present.__module__}; peft_xmask leaves it in place. "
        "Files of that type are read by the other implementation.",
        PeftXMaskWarning,
        stacklevel=2,
    )
    return False


def accept_rows() -> None:
    """Let causal language models accept ``adapter_names`` as a tensor of rows. Calling this twice is harmless.

    Before each pass of such a model, PEFT tests whether ``adapter_names`` is empty, which raises an error for a tensor
    of several rows. Rows never refer to an activated LoRA, so the test is skipped for them.
    """
    asks = getattr(variants, "is_alora_relevant_in_batch", None)
    if asks is None or hasattr(asks, "accepts_rows"):
        return

    @functools.wraps(asks)
    def is_alora_relevant_in_batch(model: Any, adapter_names: Any = None) -> Any:
        return asks(model, None if isinstance(adapter_names, torch.Tensor) else adapter_names)

    is_alora_relevant_in_batch.accepts_rows = True  # type: ignore[attr-defined]
    variants.is_alora_relevant_in_batch = is_alora_relevant_in_batch


def refuse_in_mixed_models(refuse: Callable[[Any], None]) -> None:
    """Let a ``PeftMixedModel`` ask ``refuse`` about each config first. Calling this twice is harmless."""
    check = peft.mixed_model._check_config_compatible
    if hasattr(check, "asks_first"):
        return

    @functools.wraps(check)
    def _check_config_compatible(peft_config: Any) -> None:
        refuse(peft_config)
        check(peft_config)

    _check_config_compatible.asks_first = True  # type: ignore[attr-defined]
    peft.mixed_model._check_config_compatible = _check_config_compatible
