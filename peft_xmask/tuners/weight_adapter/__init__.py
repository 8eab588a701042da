"""The weight adapter: an adapter over the base's own biases or weights. Only its result is kept."""

from .config import WeightAdapterConfig
from .layer import WeightAdapterLayer
from .model import WeightAdapterModel

__all__ = ["WeightAdapterConfig", "WeightAdapterLayer", "WeightAdapterModel"]
