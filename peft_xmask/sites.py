"""A site: one module of the base model that carries an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def partners(names: Sequence[str], present: Sequence[str]) -> list[list[str]]:
    """For each of ``names``, those of ``present`` that mean the same module.

    If none does, ``present`` may hang on a root of another name: ``bert.encoder.layer.0.output.dense`` then is
    ``backbone.encoder.layer.0.output.dense``. An encoder is never taken for a decoder.
    """
    known = dict.fromkeys(present)
    found = [_partners_of(name, known) for name in names]
    roots = {name.partition(".")[0] for name in present}
    if any(found) or len(roots) != 1 or roots <= {"encoder", "decoder"}:
        return found
    rootless = {name.partition(".")[2]: name for name in present if "." in name}
    return [[rootless[other] for other in _partners_of(name, rootless)] for name in names]


def _partners_of(name: str, present: Mapping[str, object]) -> list[str]:
    return [name] if name in present else [other for other in present if same_site(name, other)]
