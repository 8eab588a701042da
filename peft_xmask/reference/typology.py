"""Write docs/typology.md from the cards: ``python -m peft_xmask.reference.typology``."""

from __future__ import annotations

import sys
from pathlib import Path

from ..core.files import write_text
from .card import Card, cards
from .port import why_not_portable
from .tables import markdown_table
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

PAGE = Path(__file__).resolve().parents[2] / "docs" / "typology.md"
_WORDS: dict[str, type[Word]] = {
    "intra-connectivity": IntraConnectivity,
    "inter-connectivity": InterConnectivity,
    "parameters adapted": ParametersAdapted,
    "parameter sharing": ParameterSharing,
    "input type": InputType,
    "insertion form": InsertionForm,
    "number of insertions": Insertions,
    "integration form": IntegrationForm,
    "workspace": Workspace,
}
_HEAD = """# Typology of PEFT methods

This page lists every method that PEFT registers, and ours: its structure, its size as a formula, and what you can do
with it. The properties are PEFT-Ref's ([Sabry & Belz](https://arxiv.org/abs/2304.12410)). **Every value is our own
classification**; none is quoted from the paper. Each follows the rule given [below](#values-and-their-rules) or a
reason in [the last section](#reasons), and is [checked by running the method](reference.md#how-the-cards-are-checked)
where a test can check it.

The methods are those of PEFT 0.21.2 with default settings; the workspace is where PEFT inserts them in a Llama-shaped
decoder. To regenerate this page: `python -m peft_xmask.reference.typology`.
"""


def typology_page() -> str:
    """The page as Markdown."""
    parts = [_HEAD, "## Structure\n", _structure(), "## Parameters and bytes\n", _FORMULAS, _formulas()]
    parts += ["## Abilities\n", _ABILITIES, _abilities(), "## Values and their rules\n", _rules()]
    parts += ["## Reasons\n", _reasons()]
    return "\n".join(parts)


_FORMULAS = """Trainable parameters, and bytes of the saved tensors in float32. `d_in`, `d_out`: input and output width
of the host module; `bias`: 1 if the host has a bias, else 0; `parameters`: number of parameters of the host; `names`:
number of names under which the model holds it; `d_in_max` and similar: the largest over all sites; `d`: embedding
width. Other symbols are fields of the config; True counts as 1 and False as 0.
"""
_ABILITIES = """*merges*: into the base's weights, exactly. *mixed batch*: rows of one batch can use different adapters,
through `adapter_names`. Where it says no, PEFT 0.21.2 mostly accepts the names but applies the active adapter to every
row. *several*: one model can hold several adapters. *sum*: several adapters can be active at once. *portable*: the
adapter can be moved to another base of equal widths with `peft_xmask.reference.port`.
"""


def _structure() -> str:
    names = [name for name in PROPERTIES if name != "workspace"] + ["workspace"]
    titles = ["method", *(PROPERTIES[name] for name in names), "source"]
    return markdown_table(titles, [[card.title, *(card.text(name) for name in names), card.source] for card in cards()])


def _formulas() -> str:
    rows = [[card.title, f"`{card.trainable}`", f"`{card.stored}`", card.needs or None] for card in cards()]
    return markdown_table(["method", "trainable parameters", "bytes stored", "needs"], rows)


def _abilities() -> str:
    rows = [
        [card.title, card.merges, card.supports_mixed_batch, card.several, card.adds_up, why_not_portable(card) is None]
        for card in cards()
    ]
    return markdown_table(["method", "merges", "mixed batch", "several", "sum", "portable"], rows)


def _rules() -> str:
    rows = [[title, str(word), word.rule] for title, words in _WORDS.items() for word in words]
    return markdown_table(["property", "value", "rule"], rows)


def _reasons() -> str:
    return "".join(_reasons_of(card) for card in cards() if card.reasons or card.unchecked)


def _reasons_of(card: Card) -> str:
    reasons = [f"- {_name(name)}: {why}.\n" for name, why in card.reasons.items()]
    unchecked = [f"- {_name(name)}, not tested: {why}.\n" for name, why in card.unchecked.items()]
    return f"### {card.title} (`{card.method}`)\n\n{''.join(reasons + unchecked)}\n"


def _name(field: str) -> str:
    others = {
        "merges": "merging",
        "supports_mixed_batch": "mixed batches",
        "several": "several adapters",
        "adds_up": "several active",
        "trainable": "trainable parameters",
        "stored": "bytes stored",
    }
    return PROPERTIES.get(field) or others[field]


if __name__ == "__main__":
    write_text(Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE, typology_page())
