"""Moving an adapter to another base of the same widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn

from ..errors import ConfigError, TargetError
from .card import Card, card_for
from .vocabulary import PROPERTIES, InputType, ParametersAdapted, Workspace


def port(adapter: str | Path, to: nn.Module, adapter_name: str = "default") -> PeftModel:
    """Load an adapter on a base it was not made for.

    What can be ported reads and writes activations, and says nothing of the base's own numbers: bottleneck adapters,
    and masks over a pool, which comes with them. The widths of the sites must be those of the base it was made for.
    Whether the result is any good is for you to measure: it is a starting point, not a translation.

    Args:
        adapter: folder or Hub id.
        to: the new base.
        adapter_name: in the model.

    Returns:
        a :class:`peft.PeftModel` around ``to``.

    Raises:
        ConfigError: a method that cannot be ported; the message names the property that forbids it.
        TargetError: the new base's sites have other widths, or it has no such sites.
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
            f"'{adapter}' does not fit a {type(to).__name__}: an adapter can be ported between bases of equal widths "
            f"that have modules of the same names. PEFT says: {words}"
        ) from error


def why_not_portable(card: Card) -> tuple[str, str] | None:
    """The property that ties a method to its base, and how; None for a method that can be ported."""
    if card.input_type is InputType.DATA:
        return "input_type", f"{card.input_type}; what is trained lives in the base's own embeddings or keys and values"
    if card.input_type is InputType.WEIGHTS:
        return "input_type", f"{card.input_type}; what is trained is relative to the base's own weights"
    if card.parameters_adapted is ParametersAdapted.REPARAMETERISATION:
        return "parameters_adapted", f"{card.parameters_adapted}; what is trained is a change of the base's own weights"
    if Workspace.FFN_OUTPUT not in card.workspace:
        return "workspace", f"{card.text('workspace')}; it was trained along with a network, or a router, of its own"
    return None
