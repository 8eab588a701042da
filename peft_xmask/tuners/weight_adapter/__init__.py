"""The weight adapter: an adapter over the base's own biases or weights, of which only the result is kept."""

from .config import WeightAdapterConfig
from .layer import WeightAdapterLayer
from .model import WeightAdapterModel

__all__ = ["WeightAdapterConfig", "WeightAdapterLayer", "WeightAdapterModel"]
