"""Profiles in one place: what holds them (:mod:`peft_xmask.bank`) and what trains them (:mod:`peft_xmask.training`)."""

import importlib
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
    from .training.settings import ProfileTraining
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
    "ProfileTraining",
    "RayFleet",
    "RowAdamW",
    "TrainedBank",
    "Verification",
    "compare_banks",
    "train_profiles",
    "verify_bank",
]

_LAZY = {
    "ProfileTraining": ".training.settings",
    "RayFleet": ".training.fleet",
    "TrainedBank": ".training.trained_bank",
    "train_profiles": ".training.train",
}


def __getattr__(name: str) -> Any:
    """Import what trains, and with it the Trainer, only when it is used."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __package__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
