"""Pools: N frozen adapters per site, shared by all profiles."""

from .pool import AdapterPool
from .random import BOTTLENECK_SIZE, NUM_ADAPTERS
from .slice import PoolSlice

__all__ = ["BOTTLENECK_SIZE", "NUM_ADAPTERS", "AdapterPool", "PoolSlice"]
