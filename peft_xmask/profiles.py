"""Profiles in one place: what holds them (:mod:`peft_xmask.bank`) and what trains them (:mod:`peft_xmask.training`)."""

from typing import TYPE_CHECKING, Any

from .bank.bank import ProfileBank
from .bank.difference import Change, Difference, compare_banks
from .bank.live import LiveBank
from .bank.profile import Profile
from .bank.similar import Neighbour
from .bank.verification import Problem, Verification, verify_bank
from .training.collator import ProfileCollator
from .training.row_adamw import RowAdamW

if TYPE_CHECKING:
    from .training.fleet import RayFleet
    from .training.train import train_profiles
    from .training.trained_bank import TrainedBank

__all__ = [
    "Change",
    "Difference",
    "LiveBank",
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
        from .training import fleet, train, trained_bank

        homes = {"RayFleet": fleet, "TrainedBank": trained_bank, "train_profiles": train}
        return getattr(homes[name], name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
