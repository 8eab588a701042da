"""Pools: N frozen adapters per site, shared by all profiles."""

from .pool import AdapterPool
from .slice import PoolSlice

__all__ = ["AdapterPool", "PoolSlice"]
