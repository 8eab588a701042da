"""PEFT-Ref as code: how PEFT's methods differ in structure, and what a model's adapters are, checked by running them.

Source: Sabry & Belz (arXiv 2304.12410) for the properties; the values and formulas are ours.
"""

from . import catalogue
from .card import Card, card_for, cards, register_card
from .compare import compare
from .comparison import Comparison
from .compatible import Compatibility, compatible
from .describe import Description, describe
from .port import port

__all__ = [
    "Card",
    "Comparison",
    "Compatibility",
    "Description",
    "card_for",
    "cards",
    "catalogue",
    "compare",
    "compatible",
    "describe",
    "port",
    "register_card",
]
