"""Move an adapter to another base of the same widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn

from ..errors import ConfigError, TargetError
from .card import Card, card_for
from .vocabulary import PROPERTIES, InputType, ParametersAdapted, Workspace


def port(adapter: str | Path, to: nn.Module, adapter_name: str = "default") -> PeftModel:
    """Load an adapter on a base it was not trained on.

    Only adapters that read and write activations can be ported: bottleneck adapters, and masks with their pool. The
    new base needs sites of the same names and widths. Porting gives a starting point for training; measure the result
    before you use it as it is.

    Args:
        adapter: folder or Hub id.
        to: the new base.
        adapter_name: the adapter's name in the model.

    Returns:
        A :class:`peft.PeftModel` around ``to``.

    Raises:
        ConfigError: the method cannot be ported; the message names the property that rules it out.
        TargetError: the new base lacks the sites, or they have other widths.
    """
    config: Any = PeftConfig.from_pretrained(str(adapter))
    forbidden = why_not_portable(card_for(config))
    if forbidden is not None:
        name, why = forbidden
        raise ConfigError(f"{card_for(config).method} cannot be ported. {PROPERTIES[name].capitalize()}: {why}.")
    config.allow_any_base()
    try:
        return PeftModel.from_pretrained(to, str(adapter), adapter_name=adapter_name, config=config)  # type: ignore[arg-type]
    except (RuntimeError, ValueError) as error:
        words = " ".join(str(error).split())[:400]
        raise TargetError(
            f"'{adapter}' does not fit a {type(to).__name__}. An adapter can be ported between bases of equal widths "
            f"with modules of the same names. PEFT's error: {words}"
        ) from error


def why_not_portable(card: Card) -> tuple[str, str] | None:
    """The property that ties a method to its base, with the reason; None if the method can be ported."""
    if card.input_type is InputType.DATA:
        return "input_type", f"{card.input_type}; its parameters live among the base's embeddings, keys or values"
    if card.input_type is InputType.WEIGHTS:
        return "input_type", f"{card.input_type}; its parameters depend on the base's weights"
    if card.parameters_adapted is ParametersAdapted.REPARAMETERISATION:
        return "parameters_adapted", f"{card.parameters_adapted}; its parameters are a change of the base's weights"
    if Workspace.FFN_OUTPUT not in card.workspace:
        return "workspace", f"{card.text('workspace')}; it was trained together with its own network or router"
    return None
