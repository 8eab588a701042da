"""X-PEFT: profiles as masks over one frozen pool of adapters (arXiv 2401.16137)."""

from .config import XPEFTConfig
from .layer import XPEFTLayer
from .model import XPEFTModel
from .table import MaskTable

__all__ = ["MaskTable", "XPEFTConfig", "XPEFTLayer", "XPEFTModel"]
