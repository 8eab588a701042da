"""The pool: N frozen adapters per site, shared by every profile."""

from .pool import AdapterPool
from .slice import PoolSlice

__all__ = ["AdapterPool", "PoolSlice"]
