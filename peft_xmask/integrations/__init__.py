"""Where this package meets its neighbours."""

from .trainer import XPEFTCallback

__all__ = ["XPEFTCallback"]
