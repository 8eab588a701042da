"""Very many profiles: one folder that holds them all."""

from typing import TYPE_CHECKING, Any

from .bank import ProfileBank
from .collator import ProfileCollator
from .difference import Change, Difference, compare_banks
from .profile import Profile
from .row_adamw import RowAdamW
from .similar import Neighbour
from .verification import Problem, Verification, verify_bank

if TYPE_CHECKING:
    from .fleet import RayFleet
    from .trained_bank import TrainedBank
    from .training import train_profiles

__all__ = [
    "Change",
    "Difference",
    "Neighbour",
    "Problem",
    "Profile",
    "ProfileBank",
    "ProfileCollator",
    "RayFleet",
    "RowAdamW",
    "TrainedBank",
    "Verification",
    "compare_banks",
    "train_profiles",
    "verify_bank",
]


def __getattr__(name: str) -> Any:
    """Import what trains, and with it the Trainer, only when it is asked for."""
    if name in ("RayFleet", "TrainedBank", "train_profiles"):
        from . import fleet, trained_bank, training

        homes = {"RayFleet": fleet, "TrainedBank": trained_bank, "train_profiles": training}
        return getattr(homes[name], name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
