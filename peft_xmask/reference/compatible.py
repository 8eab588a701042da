"""What two adapters can do together, and if not, the property that forbids it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from peft import PeftConfig

from ..tuners.base.peft_private import COMPATIBLE_TUNER_TYPES
from .card import Card, card_for


@dataclass(frozen=True)
class Verdict:
    """Yes or no, and why.

    Attributes:
        allowed: whether it can be done.
        reason: how, or what forbids it.
    """

    allowed: bool
    reason: str

    def __bool__(self) -> bool:
        return self.allowed

    def __str__(self) -> str:
        return f"{'yes' if self.allowed else 'no'}: {self.reason}"


@dataclass(frozen=True)
class Compatibility:
    """What two adapters can do together.

    Attributes:
        held: one model has both, and switches between them.
        parallel: both are active at once, and both take effect.
        stacked: the second is put on a base into which the first has been merged.
        merged: both are merged into the base.
        mixed: rows of one batch use the one or the other.
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
    """Whether two adapters may be held, run in parallel, stacked, merged, mixed in one batch; and why not.

    Args:
        first: a config, or the name of a method, which stands for its default config.
        second: likewise; for ``stacked``, the one on top.

    Raises:
        ConfigError: a method that is not known, or has no card.
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
            return Verdict(True, f"in a PeftMixedModel (mixed=True), which takes {', '.join(sorted(joinable))}")
        return Verdict(False, f"a PeftModel holds adapters of one method, here {one.method} and {two.method}")
    if not one.several:
        return Verdict(False, f"a model holds one {one.method} adapter")
    if all(getattr(config, "bias", "none") != "none" for config in (first, second)):
        return Verdict(False, 'both train biases of the base (bias != "none"), and there is one set of them')
    return Verdict(True, f"a PeftModel holds several {one.method} adapters: add_adapter, set_adapter")


def _parallel(one: Card, two: Card, held: Verdict) -> Verdict:
    if not held:
        return held
    for card in (one, two):
        if not card.adds_up:
            why = card.reasons.get("adds_up", f"integration form {card.integration_form}: one at a time")
            return Verdict(False, f"{card.method}: {why}")
    how = "their outputs add up" if one.integration_form.value.endswith("addition") else "one after the other"
    return Verdict(True, f"set_adapter([...]) on the tuner: {how}")


def _stacked(one: Card) -> Verdict:
    if one.merges:
        return Verdict(True, "merge_and_unload() the first, then put the second on what it gives")
    return Verdict(False, _no_merge(one))


def _merged(one: Card, two: Card, held: Verdict) -> Verdict:
    for card in (one, two):
        if not card.merges:
            return Verdict(False, _no_merge(card))
    if held:
        return Verdict(True, "merge_adapter([...]) with both names")
    return Verdict(True, "one after the other: merge_and_unload() the first, put on the second, and merge that")


def _mixed(one: Card, two: Card, held: Verdict) -> Verdict:
    if one is not two:
        return Verdict(False, "adapter_names works within one method")
    if not held:
        return held
    if one.mixes:
        return Verdict(True, "adapter_names=[...], a name for each row")
    return Verdict(
        False,
        one.reasons.get(
            "mixes", f"{one.method} layers do not use adapter_names: no row would get the adapter it names"
        ),
    )


def _no_merge(card: Card) -> str:
    why = card.reasons.get("merges", f"parameters adapted: {card.parameters_adapted}; {card.parameters_adapted.rule}")
    return f"{card.method} does not merge ({why})"
