"""The page with every card, docs/typology.md: ``python -m peft_xmask.reference.typology`` writes it anew."""

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
_HEAD = """# The typology: every method PEFT registers, and ours

This page is made from the cards (`python -m peft_xmask.reference.typology`) and a test compares it with them. The
properties are those of PEFT-Ref ([Sabry & Belz](https://arxiv.org/abs/2304.12410)). **Every value is our own
classification**: none is quoted from the paper's table. It is given by the rule of the value below, or for the reason
in the last section, and [checked by running the method](reference.md#how-the-cards-are-checked) wherever it can be.

Methods are as PEFT 0.21.2 builds them with their defaults; the workspace is where it puts them in a decoder of Llama's
shape.
"""


def typology_page() -> str:
    """The page, in Markdown."""
    parts = [_HEAD, "## Structure\n", _structure(), "## Numbers and bytes\n", _FORMULAS, _formulas()]
    parts += ["## What one can do with it\n", _ABILITIES, _abilities(), "## The words and their rules\n", _rules()]
    parts += ["## Reasons, and what cannot be checked\n", _reasons()]
    return "\n".join(parts)


_FORMULAS = """Trained numbers and bytes of the saved tensors in float32. `d_in`, `d_out`: widths of the site; `bias`: 1
where it has one, else 0; `numbers`: parameters of it; `names`: how many names the model has for it; `d_in_max` and the
like: the largest over the sites; `d`: width of the embeddings; a field of the config is called by its name, yes and no
are 1 and 0.
"""
_ABILITIES = """*merges*: into the base's weights, exactly. *mixed*: one batch, several adapters, by `adapter_names`;
where it says no, PEFT 0.21.2 mostly takes the names and gives every row the active adapter. *several*: one model holds
several adapters. *sum*: several active at once, all taking effect. *ported*: to another base of equal widths, by
`peft_xmask.reference.port`.
"""


def _structure() -> str:
    names = [name for name in PROPERTIES if name != "workspace"] + ["workspace"]
    titles = ["method", *(PROPERTIES[name] for name in names), "source"]
    return markdown_table(titles, [[card.title, *(card.text(name) for name in names), card.source] for card in cards()])


def _formulas() -> str:
    rows = [[card.title, f"`{card.trained}`", f"`{card.stored}`", card.needs or None] for card in cards()]
    return markdown_table(["method", "trained numbers", "bytes stored", "needs"], rows)


def _abilities() -> str:
    rows = [
        [card.title, card.merges, card.mixes, card.several, card.adds_up, why_not_portable(card) is None]
        for card in cards()
    ]
    return markdown_table(["method", "merges", "mixed", "several", "sum", "ported"], rows)


def _rules() -> str:
    rows = [[title, str(word), word.rule] for title, words in _WORDS.items() for word in words]
    return markdown_table(["property", "value", "given when"], rows)


def _reasons() -> str:
    return "".join(_reasons_of(card) for card in cards() if card.reasons or card.unchecked)


def _reasons_of(card: Card) -> str:
    reasons = [f"- {_name(name)}: {why}.\n" for name, why in card.reasons.items()]
    unchecked = [f"- not checked by a test, {_name(name)}: {why}.\n" for name, why in card.unchecked.items()]
    return f"### {card.title} (`{card.method}`)\n\n{''.join(reasons + unchecked)}\n"


def _name(field: str) -> str:
    others = {"merges": "merging", "mixes": "mixed batches", "several": "several adapters", "adds_up": "several active"}
    return PROPERTIES.get(field) or others.get(field) or f"{field} numbers or bytes"


if __name__ == "__main__":
    write_text(Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE, typology_page())
