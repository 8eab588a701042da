"""A card describes one method in PEFT-Ref's vocabulary and gives the reason for each statement."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from ..errors import ConfigError
from .formula import Formula
from .vocabulary import (
    PROPERTIES,
    InputType,
    InsertionForm,
    Insertions,
    IntegrationForm,
    InterConnectivity,
    IntraConnectivity,
    ParametersAdapted,
    ParameterSharing,
    Word,
    Workspace,
)


def same_name(name: str) -> str:
    """Group sites by the last part of their name: ``layers.0.attn.q_proj`` and ``layers.1.attn.q_proj`` share one."""
    return name.rpartition(".")[2]


@dataclass(frozen=True)
class Card:
    """The structure of a method with its default settings.

    The properties are PEFT-Ref's. The values are our own classification: each follows the rule in
    :attr:`peft_xmask.reference.vocabulary.Word.rule`, or the reason in ``reasons``.

    Attributes:
        method: the PEFT type, as in ``config.peft_type``.
        title: the method's usual name.
        source: its paper.
        intra_connectivity: this field to ``workspace`` are the properties of :mod:`peft_xmask.reference.vocabulary`.
            The workspace is where PEFT inserts the method by default in a Llama-shaped decoder.
        trainable: number of trainable parameters.
        stored: bytes of the saved tensors, for float32.
        merges: whether PEFT can merge it into the base weights exactly.
        supports_mixed_batch: whether rows of one batch can use different adapters, through ``adapter_names``.
        several: whether one model can hold several adapters of this method.
        adds_up: whether several adapters can be active at once.
        scale: the config field with the constant of a scaled addition.
        gate: part of the parameter name of the scalar in a gated addition.
        group_of: maps a site's name to the group that the formulas count once.
        symbols: more symbols for the formulas, from the config and the sizes known so far.
        site_symbols: more symbols for a site, from the config and the site's name.
        reasons: by property, an explanation where the rule alone does not justify the value.
        unchecked: by property, why no test can check the value.
        needs: fields that a config needs besides PEFT's defaults.
    """

    method: str
    title: str
    source: str
    intra_connectivity: IntraConnectivity
    inter_connectivity: InterConnectivity
    parameters_adapted: ParametersAdapted
    parameter_sharing: ParameterSharing
    input_type: InputType
    insertion_form: InsertionForm
    insertions: Insertions
    integration_form: IntegrationForm
    workspace: frozenset[Workspace]
    trainable: Formula
    stored: Formula
    merges: bool = True
    supports_mixed_batch: bool = False
    several: bool = True
    adds_up: bool = True
    scale: str | None = None
    gate: str | None = None
    group_of: Callable[[str], str] = same_name
    symbols: Callable[[PeftConfig, Mapping[str, Any]], Mapping[str, Any]] | None = None
    site_symbols: Callable[[PeftConfig, str], Mapping[str, Any]] | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)
    unchecked: Mapping[str, str] = field(default_factory=dict)
    needs: str = ""

    def __post_init__(self) -> None:
        for name in ("reasons", "unchecked"):
            given = getattr(self, name)
            unknown = (
                set(given)
                - set(PROPERTIES)
                - {"trainable", "stored", "merges", "supports_mixed_batch", "several", "adds_up"}
            )
            if unknown:
                raise ConfigError(f"`{name}` of the {self.method} card has unknown properties: {sorted(unknown)}.")
            object.__setattr__(self, name, MappingProxyType(dict(given)))
        object.__setattr__(self, "workspace", frozenset(self.workspace))

    def reason(self, name: str) -> str:
        """Why the property has its value."""
        if name in self.reasons:
            return self.reasons[name]
        value = getattr(self, name)
        return "; ".join(word.rule for word in sorted(value)) if name == "workspace" else str(value.rule)

    def text(self, name: str) -> str:
        """A property's value as text."""
        value = getattr(self, name)
        if name == "workspace":
            order = list(Workspace)
            return ", ".join(str(word) for word in sorted(value, key=order.index))
        if isinstance(value, bool):
            return "yes" if value else "no"
        return str(value)

    def properties(self) -> dict[str, str]:
        """This method's values by PEFT-Ref property name."""
        return {title: self.text(name) for name, title in PROPERTIES.items()}

    def words(self) -> dict[str, Word]:
        """The single-valued properties: all but the workspace."""
        return {name: getattr(self, name) for name in PROPERTIES if name != "workspace"}


_CARDS: dict[str, Card] = {}


def register_card(card: Card) -> Card:
    """Add a card, for example for your own PEFT method.

    Raises:
        ConfigError: the method already has a different card.
    """
    if _CARDS.setdefault(card.method, card) is not card:
        raise ConfigError(f"{card.method} already has a card. Register each method once.")
    return card


def add_card(method: str, title: str, source: str, like: Mapping[str, Any], **fields: Any) -> Card:
    """Register a card with the fields of ``like``, overridden by ``fields``."""
    return register_card(Card(method=method, title=title, source=source, **{**like, **fields}))


def cards() -> tuple[Card, ...]:
    """All cards, sorted by method."""
    return tuple(_CARDS[name] for name in sorted(_CARDS))


def card_for(method: PeftConfig | type[PeftConfig] | str) -> Card:
    """The card of a config, a config class or a PEFT type's name.

    Raises:
        ConfigError: the method is unknown or has no card.
    """
    name = _method_name(method)
    if name in _CARDS:
        return _CARDS[name]
    if name in [str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING]:
        raise ConfigError(
            f"The PEFT method {name} has no card. Add one with peft_xmask.reference.register_card(Card(...))."
        )
    raise ConfigError(f"Unknown PEFT method {name!r}. Methods with a card: {', '.join(sorted(_CARDS))}.")


def in_float32(formula: Formula) -> Formula:
    """Bytes of that many float32 values."""
    return 4 * formula


def _method_name(method: PeftConfig | type[PeftConfig] | str) -> str:
    if isinstance(method, str):
        return str(getattr(method, "value", method)).upper().replace("-", "_")
    if inspect.isclass(method):
        for kind, config_cls in PEFT_TYPE_TO_CONFIG_MAPPING.items():
            if config_cls is method:
                return str(kind.value)
        return method.__name__
    named: Any = getattr(method, "peft_type", None)
    if named is None:
        raise ConfigError(f"Expected a PEFT config, a config class or a method name, found {method!r}.")
    return str(getattr(named, "value", named))
