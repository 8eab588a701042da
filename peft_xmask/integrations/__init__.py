"""Where this package meets its neighbours."""

from .export import export_lora
from .trainer import XPEFTCallback

__all__ = ["XPEFTCallback", "export_lora"]
