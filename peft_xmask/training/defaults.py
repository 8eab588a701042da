"""What the settings of several kinds of run share."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeVar

from transformers import DataCollatorWithPadding, default_data_collator

from ..errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Settings = TypeVar("Settings", bound=DataclassInstance)


def changed(cls: type[Settings], settings: Settings | None, changes: dict[str, Any]) -> Settings:
    """Settings with some fields changed.

    Args:
        cls: a dataclass of settings.
        settings: None: the defaults.
        changes: values by field name.

    Raises:
        ConfigError: a name that is not a field, or an invalid value.
    """
    known = [each.name for each in dataclasses.fields(cls)]
    unknown = sorted(changes.keys() - set(known))
    if unknown:
        raise ConfigError(f"Unknown settings: {', '.join(unknown)}. Expected some of {', '.join(known)}.")
    return dataclasses.replace(settings or cls(), **changes)


def padding_collator(processing_class: Any) -> Any:
    """The default collator: pads with a tokenizer, or stacks examples of equal length if there is none."""
    return default_data_collator if processing_class is None else DataCollatorWithPadding(processing_class)
