"""Where this package meets its neighbours."""

from .card import complete_cards_of_peft
from .export import export_lora
from .record import RecordCallback
from .sparse_delta import export_sparse_delta
from .trainer import XPEFTCallback

__all__ = ["RecordCallback", "XPEFTCallback", "export_lora", "export_sparse_delta"]

complete_cards_of_peft()
