"""A site: one module of the base model that carries an adapter."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """What an adapter has to fit.

    Attributes:
        name: dotted name of the adapted module in the base model.
        in_features: width the adapter reads: the module's output (sequential) or its input (parallel).
        out_features: width the adapter writes: the module's output.
    """

    name: str
    in_features: int
    out_features: int


def same_site(name: str, other: str) -> bool:
    """Whether two dotted names mean the same module seen from different roots.

    ``bert.encoder.layer.0.output.dense`` and ``encoder.layer.0.output.dense`` do: one is the other's ending.
    """
    return name == other or name.endswith(f".{other}") or other.endswith(f".{name}")
