"""Which combinations of two adapters work, and the property that rules out the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from peft import PeftConfig

from ..tuners.base.peft_private import COMPATIBLE_TUNER_TYPES
from .card import Card, card_for


@dataclass(frozen=True)
class Verdict:
    """Whether a combination works, and why.

    Attributes:
        allowed: whether it works.
        reason: how to do it, or what rules it out.
    """

    allowed: bool
    reason: str

    def __bool__(self) -> bool:
        return self.allowed

    def __str__(self) -> str:
        return f"{'yes' if self.allowed else 'no'}: {self.reason}"


@dataclass(frozen=True)
class Compatibility:
    """Which combinations of two adapters work.

    Attributes:
        held: one model holds both and switches between them.
        parallel: both are active at once, and both take effect.
        stacked: the second is added to a base into which the first was merged.
        merged: both are merged into the base.
        mixed: each row of one batch chooses between them.
    """

    held: Verdict
    parallel: Verdict
    stacked: Verdict
    merged: Verdict
    mixed: Verdict

    def __iter__(self) -> Iterator[tuple[str, Verdict]]:
        for field in fields(self):
            yield field.name, getattr(self, field.name)

    def __str__(self) -> str:
        return "\n".join(f"{name}: {verdict}" for name, verdict in self)


def compatible(first: PeftConfig | str, second: PeftConfig | str) -> Compatibility:
    """Say which combinations of two adapters work, and why the others do not.

    Args:
        first: a config, or a method's name for its default config.
        second: the same; for ``stacked``, the adapter on top.

    Raises:
        ConfigError: a method is unknown or has no card.
    """
    one, two = card_for(first), card_for(second)
    held = _held(one, two, first, second)
    return Compatibility(
        held=held,
        parallel=_parallel(one, two, held),
        stacked=_stacked(one),
        merged=_merged(one, two, held),
        mixed=_mixed(one, two, held),
    )


def _held(one: Card, two: Card, first: Any, second: Any) -> Verdict:
    if one is not two:
        joinable = {str(kind.value) for kind in COMPATIBLE_TUNER_TYPES}
        if {one.method, two.method} <= joinable:
            return Verdict(True, f"in a PeftMixedModel (mixed=True), which accepts {', '.join(sorted(joinable))}")
        return Verdict(False, f"a PeftModel holds adapters of one method, but these are {one.method} and {two.method}")
    if not one.several:
        return Verdict(False, f"a model can hold only one {one.method} adapter")
    if all(getattr(config, "bias", "none") != "none" for config in (first, second)):
        return Verdict(False, 'both train the base\'s biases (bias != "none"), and the base has only one set')
    return Verdict(True, f"use add_adapter and set_adapter: a PeftModel can hold several {one.method} adapters")


def _parallel(one: Card, two: Card, held: Verdict) -> Verdict:
    if not held:
        return held
    for card in (one, two):
        if not card.adds_up:
            why = card.reasons.get("adds_up", f"integration form {card.integration_form}: only one at a time")
            return Verdict(False, f"{card.method}: {why}")
    how = (
        "their outputs add up" if one.integration_form.value.endswith("addition") else "they apply one after the other"
    )
    return Verdict(True, f"set_adapter([...]) on the tuner: {how}")


def _stacked(one: Card) -> Verdict:
    if one.merges:
        return Verdict(True, "merge_and_unload() the first, then add the second to the result")
    return Verdict(False, _no_merge(one))


def _merged(one: Card, two: Card, held: Verdict) -> Verdict:
    for card in (one, two):
        if not card.merges:
            return Verdict(False, _no_merge(card))
    if held:
        return Verdict(True, "merge_adapter([...]) with both names")
    return Verdict(True, "one at a time: merge_and_unload() the first, add the second, and merge it too")


def _mixed(one: Card, two: Card, held: Verdict) -> Verdict:
    if one is not two:
        return Verdict(False, "adapter_names works within one method")
    if not held:
        return held
    if one.supports_mixed_batch:
        return Verdict(True, "adapter_names=[...], one name per row")
    return Verdict(
        False,
        one.reasons.get(
            "supports_mixed_batch",
            f"{one.method} layers ignore adapter_names, so rows would not get the adapters they name",
        ),
    )


def _no_merge(card: Card) -> str:
    why = card.reasons.get("merges", f"parameters adapted: {card.parameters_adapted}; {card.parameters_adapted.rule}")
    return f"{card.method} cannot be merged ({why})"
