"""A card: what a method is, in PEFT-Ref's words, and where each statement comes from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from ..errors import ConfigError
from .formula import Formula, times
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
    """Sites of one group have modules of one name: ``layers.0.self_attn.q_proj`` and ``layers.1.self_attn.q_proj``."""
    return name.rpartition(".")[2]


@dataclass(frozen=True)
class Card:
    """The structure of a method, with its defaults.

    PEFT-Ref names the properties; none of the values is quoted from its table: each is ours, given by the rule of the
    value (:attr:`peft_xmask.reference.vocabulary.Word.rule`), or for the reason in ``reasons``.

    Attributes:
        method: the PEFT type, as in ``config.peft_type``.
        title: what people call it.
        source: paper.
        intra_connectivity: to ``workspace``: the properties, see :mod:`peft_xmask.reference.vocabulary`. The workspace
            is where PEFT puts the method by default in a decoder of Llama's shape.
        trained: how many numbers are trained.
        stored: bytes of the saved tensors, for float32.
        merges: whether PEFT merges it into the base weights exactly.
        mixes: whether one batch can use several adapters of it, by ``adapter_names``.
        several: whether one model can hold several adapters of it.
        adds_up: whether several adapters can be active at once.
        scale: config field that is the constant of a scaled addition.
        gate: part of the name of the trained scalar of a gated addition.
        group_of: which sites share what the formulas count per group.
        symbols: further symbols of the formulas, from the config and the sizes that are known already.
        site_symbols: further symbols of a site, from its name and the config.
        reasons: by property, why we gave the value where its rule is not the whole story.
        unchecked: by property, why no test can check the value.
        needs: what a config must have besides PEFT's defaults.
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
    trained: Formula
    stored: Formula
    merges: bool = True
    mixes: bool = False
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
            unknown = set(given) - set(PROPERTIES) - {"trained", "stored", "merges", "mixes", "several", "adds_up"}
            if unknown:
                raise ConfigError(f"{name} of the card of {self.method} speaks of {sorted(unknown)}, which it has not.")
            object.__setattr__(self, name, MappingProxyType(dict(given)))
        object.__setattr__(self, "workspace", frozenset(self.workspace))

    def reason(self, name: str) -> str:
        """Why a property has its value."""
        if name in self.reasons:
            return self.reasons[name]
        value = getattr(self, name)
        return "; ".join(word.rule for word in sorted(value)) if name == "workspace" else str(value.rule)

    def text(self, name: str) -> str:
        """A property's value in words."""
        value = getattr(self, name)
        if name == "workspace":
            order = list(Workspace)
            return ", ".join(str(word) for word in sorted(value, key=order.index))
        if isinstance(value, bool):
            return "yes" if value else "no"
        return str(value)

    def properties(self) -> dict[str, str]:
        """PEFT-Ref's names and this method's values."""
        return {title: self.text(name) for name, title in PROPERTIES.items()}

    def words(self) -> dict[str, Word]:
        """The properties that have one value each."""
        return {name: getattr(self, name) for name in PROPERTIES if name != "workspace"}


_CARDS: dict[str, Card] = {}


def register_card(card: Card) -> Card:
    """Add a method's card, for instance one of your own PEFT method.

    Raises:
        ConfigError: the method has another card already.
    """
    if _CARDS.setdefault(card.method, card) is not card:
        raise ConfigError(f"There is a card of {card.method} already. Register a method once.")
    return card


def add_card(method: str, title: str, source: str, like: Mapping[str, Any], **fields: Any) -> Card:
    """Register a card whose fields are those of ``like``, but for the ones given."""
    return register_card(Card(method=method, title=title, source=source, **{**like, **fields}))


def cards() -> tuple[Card, ...]:
    """All cards, by method."""
    return tuple(_CARDS[name] for name in sorted(_CARDS))


def card_for(method: PeftConfig | type[PeftConfig] | str) -> Card:
    """The card of a config, a config class or a PEFT type's name.

    Raises:
        ConfigError: no such method, or one without a card.
    """
    name = _method_name(method)
    if name in _CARDS:
        return _CARDS[name]
    if name in [str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING]:
        raise ConfigError(
            f"The PEFT method {name} has no card. Describe it with peft_xmask.reference.register_card(Card(...))."
        )
    raise ConfigError(f"There is no PEFT method {name!r}. Methods with a card: {', '.join(sorted(_CARDS))}.")


def in_float32(formula: Formula) -> Formula:
    """Bytes of as many float32 numbers."""
    return times(4, formula)


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
        raise ConfigError(f"Expected a PEFT config, its class or a method's name, found {method!r}.")
    return str(getattr(named, "value", named))
