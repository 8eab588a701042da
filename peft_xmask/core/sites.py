"""Sites are the modules of a base model that carry an adapter. This module also pairs the sites of two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import PoolMismatchError

TOWERS = ("encoder", "decoder", "text", "language", "vision", "audio")
"""Parts of a root's name that identify one of a model's towers."""


@dataclass(frozen=True)
class Site:
    """A module that carries an adapter, with the widths that the adapter has to fit.

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
    """For each of ``names``, the entries of ``present`` that mean the same module.

    If there is none, the root may have another name: ``bert.encoder.layer.0.output.dense`` then matches
    ``backbone.encoder.layer.0.output.dense``. A root that names one tower of a model does not match another: an encoder
    never matches a decoder, nor ``text_model`` ``vision_model``. A single word below the root never matches either,
    because it could occur anywhere.
    """
    known = dict.fromkeys(present)
    found = [_partners_of(name, known) for name in names]
    roots = {name.partition(".")[0] for name in present}
    if any(found) or len(roots) != 1 or any(tower in root for tower in TOWERS for root in roots):
        return found
    rootless = {name.partition(".")[2]: name for name in present if name.count(".") > 1}
    return [[rootless[other] for other in _partners_of(name, rootless)] for name in names]


def _partners_of(name: str, present: Mapping[str, object]) -> list[str]:
    return [name] if name in present else [other for other in present if same_site(name, other)]


def match_names(names: Sequence[str], present: Sequence[str]) -> list[str]:
    """For each of ``names``, the entry of ``present`` that means the same module, whatever the root is called.

    Raises:
        PoolMismatchError: the numbers of names differ, or a name has no match or several.
    """
    matches = partners(names, present)
    missing = [name for name, found in zip(names, matches, strict=True) if not found]
    used = {found[0] for found in matches if found}
    left = [other for other in present if other not in used]
    if len(names) != len(present) or missing:
        differences = _listed(" Not in the pool", missing) + _listed(" Only in the pool", left)
        raise PoolMismatchError(
            f"Expected the {len(present)} sites of the pool, found {len(names)} in the model.{differences} Pass "
            "target_modules that name exactly the sites the pool was made for.",
            expected=sorted(present),
            found=sorted(names),
        )
    several = [(name, found) for name, found in zip(names, matches, strict=True) if len(found) > 1]
    if several or len(used) != len(names):
        raise PoolMismatchError(
            f"The sites of the pool and of the model cannot be paired one to one. Expected names such as "
            f"{present[0]!r}, found {names[0]!r}.{_listed(' Ambiguous', [name for name, _ in several])}",
            expected=sorted(present),
            found=sorted(names),
        )
    return [found[0] for found in matches]


def _listed(title: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{title}: {', '.join(repr(name) for name in names[:3])}{more}."
