"""Integrations with the Trainer, and exports for other tools."""

from ..tuners.base.model_card import complete_cards_of_peft
from ..tuners.base.saving import save_adapters_as_a_whole
from .export import export_lora
from .fold import fold
from .pooled_classifier import MeanPooledClassifier, PooledClassifierConfig, register
from .record import RecordCallback
from .sparse_delta import export_sparse_delta
from .trainer import XPEFTCallback
from .weight_adapter import WeightAdapterCallback

__all__ = [
    "MeanPooledClassifier",
    "PooledClassifierConfig",
    "RecordCallback",
    "WeightAdapterCallback",
    "XPEFTCallback",
    "export_lora",
    "export_sparse_delta",
    "fold",
]

register()
complete_cards_of_peft()
save_adapters_as_a_whole()
