"""Very many profiles: one folder that holds them all."""

from .bank import ProfileBank
from .profile import Profile

__all__ = ["Profile", "ProfileBank"]
