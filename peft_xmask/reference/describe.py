"""What the adapters of a model are."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftMixedModel
from torch import nn

from ..errors import ConfigError
from .card import Card, card_for
from .count import expected_bytes, expected_numbers, stored_bytes, trained_numbers
from .sites import adapted_sites, base_of, blocks_of
from .tables import markdown_table
from .vocabulary import PROPERTIES


@dataclass(frozen=True)
class AdapterDescription:
    """One adapter of a model.

    Attributes:
        name: in the model.
        card: of its method.
        active: whether it takes effect now.
        sites: how many modules it touches, by the part of the model they are.
        layers: how many blocks it touches, of how many.
        formula_numbers: trained numbers by the card's formula.
        trained_numbers: counted; None where training would not move the adapter now.
        formula_bytes: bytes of the saved tensors by the card's formula, in float32.
        stored_bytes: of the saved tensors, as PEFT saves them, heads apart; None for a mixed model, which it cannot.
    """

    name: str
    card: Card
    active: bool
    sites: dict[str, int]
    layers: tuple[int, int]
    formula_numbers: int
    trained_numbers: int | None
    formula_bytes: int
    stored_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "adapter": self.name,
            "method": self.card.method,
            "active": self.active,
            **{title: self.card.text(name) for name, title in PROPERTIES.items() if name != "workspace"},
            "workspace": ", ".join(f"{count}x {part}" for part, count in self.sites.items()) or "none: a prompt",
            "blocks touched": f"{self.layers[0]} of {self.layers[1]}",
            "trained numbers": self.trained_numbers,
            "by formula": f"{self.formula_numbers} = {self.card.trained}",
            "bytes stored": self.stored_bytes,
            "bytes by formula": f"{self.formula_bytes} = {self.card.stored}",
            "merges": self.card.text("merges"),
            "mixed batches": self.card.text("mixes"),
        }


@dataclass(frozen=True)
class Description:
    """The adapters of a model, in its order."""

    adapters: tuple[AdapterDescription, ...]

    def to_dict(self) -> list[dict[str, Any]]:
        """Plain data, an adapter each."""
        return [adapter.to_dict() for adapter in self.adapters]

    def to_markdown(self) -> str:
        """A table with a column for each adapter."""
        columns = self.to_dict()
        names = list(columns[0]) if columns else []
        rows = [[name, *(column[name] for column in columns)] for name in names if name != "adapter"]
        return markdown_table(["property", *(f"`{column['adapter']}`" for column in columns)], rows)

    def __str__(self) -> str:
        return self.to_markdown()


def describe(model: nn.Module) -> Description:
    """Every adapter of a PEFT model, stock or ours: its structure, its sites, its formulas filled in, what is measured.

    The model is not changed; each adapter is saved to a temporary folder to measure it.

    Raises:
        ConfigError: not a PEFT model, or a method without a card.
    """
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    if not configs:
        raise ConfigError(f"Expected a PEFT model with an adapter, found a {type(model).__name__} without one.")
    inner = _of_a_mixture(configs)
    return Description(tuple(_describe(model, name) for name in configs if name not in inner))


def _of_a_mixture(configs: dict[str, Any]) -> set[str]:
    """The LoRA adapters that belong to an X-LoRA."""
    return {name for config in configs.values() for name in _inner(config)}


def _inner(config: Any) -> list[str]:
    return list(getattr(config, "adapters", None) or {})


def _describe(model: Any, name: str) -> AdapterDescription:
    card = card_for(model.peft_config[name])
    sites = adapted_sites(model, name)
    active = bool({name, *_inner(model.peft_config[name])} & set(_active(model)))
    parts = Counter(str(part) for site in sites for part in site.workspace)
    return AdapterDescription(
        name=name,
        card=card,
        active=active,
        sites=dict(parts),
        layers=(len({site.layer for site in sites} - {None}), len(blocks_of(base_of(model)))),
        formula_numbers=expected_numbers(model, name),
        trained_numbers=_counted(model, name) if active else None,
        formula_bytes=expected_bytes(model, name),
        stored_bytes=_saved_bytes(model, name),
    )


def _active(model: Any) -> list[str]:
    active = getattr(model, "active_adapters", None) or getattr(model, "active_adapter", [])
    active = active() if callable(active) else active
    return [active] if isinstance(active, str) else list(active)


def _counted(model: Any, name: str) -> int | None:
    """Trained numbers of one adapter; None if it is frozen."""
    if set(_active(model)) <= {name, *_inner(model.peft_config[name])}:
        return trained_numbers(model) or None
    own = (
        parameter.numel()
        for key, parameter in model.named_parameters()
        if parameter.requires_grad and name in key.split(".")
    )
    return sum(own) or None


def _saved_bytes(model: Any, name: str) -> int | None:
    if isinstance(model, PeftMixedModel):
        return None
    whole = getattr(model.peft_config[name], "modules_to_save", None) or ()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=[name])
        return stored_bytes(Path(folder) / ("" if name == "default" else name), whole)
