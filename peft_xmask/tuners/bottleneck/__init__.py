"""The classic bottleneck adapter, for building pools and as a baseline."""

from .config import BottleneckConfig
from .layer import BottleneckLayer
from .model import BottleneckModel

__all__ = ["BottleneckConfig", "BottleneckLayer", "BottleneckModel"]
