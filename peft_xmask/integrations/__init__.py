"""Where this package meets its neighbours."""

from .card import complete_cards_of_peft
from .export import export_lora
from .trainer import XPEFTCallback

__all__ = ["XPEFTCallback", "export_lora"]

complete_cards_of_peft()
