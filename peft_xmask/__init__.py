"""Personalise one frozen model for very many profiles, as a plugin for Hugging Face PEFT.

Importing this package makes its methods known to PEFT; from there on ``peft.get_peft_model``,
``PeftModel.from_pretrained``, transformers' ``load_adapter`` and the Trainer work as with any other method.
"""

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
from .tuners.base.profile_size import profile_size
from .tuners.bottleneck import BottleneckConfig
from .tuners.magnitude_mask import MagnitudeMaskConfig
from .tuners.weight_adapter import WeightAdapterConfig
from .tuners.xpeft import XPEFTConfig

__all__ = [
    "AdapterPool",
    "BottleneckConfig",
    "LiveBank",
    "MagnitudeMaskConfig",
    "MeanPooledClassifier",
    "PeftXMaskError",
    "PeftXMaskWarning",
    "PooledClassifierConfig",
    "Profile",
    "ProfileBank",
    "ProfileSize",
    "RecordCallback",
    "WeightAdapterCallback",
    "WeightAdapterConfig",
    "XPEFTCallback",
    "XPEFTConfig",
    "__version__",
    "export_lora",
    "export_sparse_delta",
    "fold",
    "profile_size",
]
