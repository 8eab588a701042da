"""The magnitude mask: train the smallest weights of a base, and store only their changes."""

from .config import MagnitudeMaskConfig
from .layer import MagnitudeMaskLayer
from .model import MagnitudeMaskModel

__all__ = ["MagnitudeMaskConfig", "MagnitudeMaskLayer", "MagnitudeMaskModel"]
