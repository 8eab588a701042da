"""A bank's rows as an adapter of a model."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from ..errors import ConfigError
from ..tuners.xpeft import XPEFTConfig
from ..tuners.xpeft.table import find_table
from .names import NameIndex
from .storage import BITS, GAIN_BITS, OFFSET_BITS, ROWS, Content


def serve(model: nn.Module, adapter_name: str, config: XPEFTConfig, content: Content) -> PeftModel:
    """Add an adapter whose masks stay where they are. It is made with one row, so that nothing is drawn for the others.

    Raises:
        ConfigError: an adapter of this name exists, or the base has no head like the one that the profiles share.
        BaseMismatchError, PoolMismatchError: the profiles are of another base or pool.
    """
    config = copy.copy(config)
    config.num_profiles, config.inference_mode = 1, True
    if isinstance(model, PeftModel):
        if adapter_name in model.peft_config:
            raise ConfigError(f"The model has an adapter '{adapter_name}' already. Choose another adapter_name.")
        model.add_adapter(adapter_name, config)
        model.set_adapter(adapter_name, inference_mode=True)
    else:
        model = get_peft_model(model, config, adapter_name=adapter_name)
    first = {key: tensor[:1] for key, tensor in content.rows.items()}
    loaded: Any = set_peft_model_state_dict(model, {**content.shared, **first}, adapter_name=adapter_name)
    if loaded.unexpected_keys:
        _take_out(model, adapter_name)
        raise ConfigError(
            f"The profiles share modules that this base does not have: {', '.join(sorted(loaded.unexpected_keys))}. "
            f"Load the base with the same head, for task_type={config.task_type!r}."
        )
    put_in_place(model, adapter_name, content)
    return model.eval()


def _take_out(model: PeftModel, adapter_name: str) -> None:
    """Leave the base as it was before :func:`serve`."""
    if len(model.peft_config) > 1:
        model.delete_adapter(adapter_name)
    else:
        model.unload()  # type: ignore[operator]


def put_in_place(model: PeftModel, adapter_name: str, content: Content) -> None:
    """Let an adapter that is not trained have these rows, whatever it had before. Nothing is copied."""
    served: Any = model.peft_config[adapter_name]
    served.num_profiles = len(content.bits)
    assert content.names is not None
    extra = {} if content.offset_bits is None else {"offset_bits": content.offset_bits}
    find_table(model).serve(adapter_name, content.bits, content.gain_bits, content.names, **extra)


def served_content(model: PeftModel, adapter_name: str) -> Content:
    """What an adapter serves now.

    Raises:
        ConfigError: it serves no bank.
    """
    masks = find_table(model).adapters.get(adapter_name)
    names = None if masks is None else masks.names
    if not isinstance(names, NameIndex):
        raise ConfigError(
            f"Expected an adapter '{adapter_name}' that serves a bank, found none. Attach the bank first."
        )
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    shared = {key: tensor.cpu() for key, tensor in state.items() if key not in ROWS}
    return Content(state[BITS], state.get(GAIN_BITS), shared, names, state.get(OFFSET_BITS))
