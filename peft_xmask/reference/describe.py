"""Describe the adapters of a model."""

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
from .count import expected_bytes, expected_parameters, stored_bytes, trainable_parameters
from .sites import adapted_sites, base_of, blocks_of
from .tables import markdown_table
from .vocabulary import PROPERTIES


@dataclass(frozen=True)
class AdapterDescription:
    """One adapter of a model.

    Attributes:
        name: the adapter's name in the model.
        card: the card of its method.
        active: whether the adapter is active.
        sites: number of adapted modules by the part of the model they belong to.
        layers: number of blocks it touches, and number of blocks in the model.
        formula_parameters: trainable parameters according to the card's formula.
        trainable_parameters: counted trainable parameters; None while the adapter is inactive or frozen.
        formula_bytes: float32 bytes of the saved tensors according to the card's formula.
        stored_bytes: bytes of the tensors that PEFT saves, without heads; None for a PeftMixedModel, which cannot save.
    """

    name: str
    card: Card
    active: bool
    sites: dict[str, int]
    layers: tuple[int, int]
    formula_parameters: int
    trainable_parameters: int | None
    formula_bytes: int
    stored_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """The facts by title."""
        return {
            "adapter": self.name,
            "method": self.card.method,
            "active": self.active,
            **{title: self.card.text(name) for name, title in PROPERTIES.items() if name != "workspace"},
            "workspace": ", ".join(f"{count}x {part}" for part, count in self.sites.items()) or "none: a prompt",
            "blocks touched": f"{self.layers[0]} of {self.layers[1]}",
            "trainable parameters": self.trainable_parameters,
            "by formula": f"{self.formula_parameters} = {self.card.trainable}",
            "bytes stored": self.stored_bytes,
            "bytes by formula": f"{self.formula_bytes} = {self.card.stored}",
            "merges": self.card.text("merges"),
            "mixed batches": self.card.text("supports_mixed_batch"),
        }


@dataclass(frozen=True)
class Description:
    """The adapters of a model, in the model's order."""

    adapters: tuple[AdapterDescription, ...]

    def to_dict(self) -> list[dict[str, Any]]:
        """One dict per adapter."""
        return [adapter.to_dict() for adapter in self.adapters]

    def to_markdown(self) -> str:
        """A Markdown table with one column per adapter."""
        columns = self.to_dict()
        names = list(columns[0]) if columns else []
        rows = [[name, *(column[name] for column in columns)] for name in names if name != "adapter"]
        return markdown_table(["property", *(f"`{column['adapter']}`" for column in columns)], rows)

    def __str__(self) -> str:
        return self.to_markdown()


def describe(model: nn.Module) -> Description:
    """Describe every adapter of a PEFT model: structure, sites, evaluated formulas, and measured sizes.

    Works for PEFT's own methods and ours. The model is not modified; each adapter is saved to a temporary folder to
    measure its files.

    Raises:
        ConfigError: the model has no adapter, or a method has no card.
    """
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    if not configs:
        raise ConfigError(
            f"Expected a PEFT model with at least one adapter, found a {type(model).__name__} without any."
        )
    inner = _of_a_mixture(configs)
    return Description(tuple(_describe(model, name) for name in configs if name not in inner))


def _of_a_mixture(configs: dict[str, Any]) -> set[str]:
    """Names of the LoRA adapters inside an X-LoRA adapter."""
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
        formula_parameters=expected_parameters(model, name),
        trainable_parameters=_counted(model, name) if active else None,
        formula_bytes=expected_bytes(model, name),
        stored_bytes=_saved_bytes(model, name),
    )


def _active(model: Any) -> list[str]:
    active = getattr(model, "active_adapters", None) or getattr(model, "active_adapter", [])
    active = active() if callable(active) else active
    return [active] if isinstance(active, str) else list(active)


def _counted(model: Any, name: str) -> int | None:
    """Trainable parameters of one adapter; None if it is frozen."""
    if set(_active(model)) <= {name, *_inner(model.peft_config[name])}:
        return trainable_parameters(model) or None
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
