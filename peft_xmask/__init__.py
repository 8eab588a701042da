"""Personalise one frozen model for very many profiles, as a plugin for Hugging Face PEFT.

Importing this package makes its methods known to PEFT; from there on ``peft.get_peft_model``,
``PeftModel.from_pretrained``, transformers' ``load_adapter`` and the Trainer work as with any other method.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .core.adapter_folder import ProfileSize
from .errors import PeftXMaskError, PeftXMaskWarning
from .integrations import (
    MeanPooledClassifier,
    PooledClassifierConfig,
    RecordCallback,
    WeightAdapterCallback,
    XPEFTCallback,
    export_lora,
    export_sparse_delta,
    fold,
)
from .pool import AdapterPool
from .profiles import LiveBank, Profile, ProfileBank
from .tuners.base.beneath import as_base
from .tuners.base.profile_size import profile_size
from .tuners.bottleneck import BottleneckConfig
from .tuners.magnitude_mask import MagnitudeMaskConfig
from .tuners.weight_adapter import WeightAdapterConfig
from .tuners.xpeft import XPEFTConfig

if TYPE_CHECKING:
    from .bank.difference import compare_banks
    from .bank.verification import verify_bank
    from .training.fit_pool import FittedPool, fit_pool
    from .training.learn import Learner, ProfileLearning, learn_profile
    from .training.pool_settings import PoolFitting
    from .training.settings import ProfileTraining
    from .training.train import train_profiles

__all__ = [
    "AdapterPool",
    "BottleneckConfig",
    "FittedPool",
    "Learner",
    "LiveBank",
    "MagnitudeMaskConfig",
    "MeanPooledClassifier",
    "PeftXMaskError",
    "PeftXMaskWarning",
    "PoolFitting",
    "PooledClassifierConfig",
    "Profile",
    "ProfileBank",
    "ProfileLearning",
    "ProfileSize",
    "ProfileTraining",
    "RecordCallback",
    "WeightAdapterCallback",
    "WeightAdapterConfig",
    "XPEFTCallback",
    "XPEFTConfig",
    "__version__",
    "as_base",
    "compare_banks",
    "export_lora",
    "export_sparse_delta",
    "fit_pool",
    "fold",
    "learn_profile",
    "profile_size",
    "train_profiles",
    "verify_bank",
]

_LAZY = {
    "FittedPool": ".training.fit_pool",
    "Learner": ".training.learn",
    "PoolFitting": ".training.pool_settings",
    "ProfileLearning": ".training.learn",
    "ProfileTraining": ".training.settings",
    "compare_banks": ".bank.difference",
    "fit_pool": ".training.fit_pool",
    "learn_profile": ".training.learn",
    "train_profiles": ".training.train",
    "verify_bank": ".bank.verification",
}


def __getattr__(name: str) -> Any:
    """Import what few programs need only when it is used: training imports the Trainer."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
