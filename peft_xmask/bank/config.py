"""Write the config of a bank's profiles, and read it from untrusted files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..core.masks import MASK_WEIGHTINGS
from ..errors import FileFormatError
from ..tuners.base.config import require_choice, require_positive
from ..tuners.xpeft import XPEFTConfig

_KINDS: Mapping[str, tuple[type, ...]] = {
    "learn_gain": (bool,),
    "layer_norm": (bool,),
    "scale": (int, float),
    "pool": (str, type(None)),
    "pool_seed": (int,),
    "pool_fingerprint": (str, type(None)),
    "base_fingerprint": (str, type(None)),
    "base_model_name_or_path": (str, type(None)),
}


def fields_of(config: XPEFTConfig) -> dict[str, Any]:
    """A config as JSON holds it."""
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}


def config_of(fields: Mapping[str, Any], where: str) -> XPEFTConfig:
    """The config with these fields, which must be completely resolved.

    ``num_profiles`` is left out: the number of rows says it, and an emptied bank has none.

    Args:
        where: they come from, for errors.

    Raises:
        FileFormatError: the method is another one, or a value is invalid.
    """
    if fields.get("peft_type") != "XPEFT":
        raise FileFormatError(
            f"Expected the config of an X-PEFT adapter in '{where}', found one of {fields.get('peft_type')!r}."
        )
    try:
        kept = {name: value for name, value in fields.items() if name != "num_profiles"}
        config: XPEFTConfig = XPEFTConfig.from_peft_type(**kept)
        require_positive("top_k", config.top_k)
        require_choice("mask_weighting", config.mask_weighting, MASK_WEIGHTINGS)
        for name, kinds in _KINDS.items():
            if not isinstance(getattr(config, name), kinds):
                raise ValueError(f"{name}={getattr(config, name)!r} is invalid")
        if config.scale is None or not math.isfinite(config.scale):
            raise ValueError(f"scale={config.scale!r} is invalid")
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise FileFormatError(
            f"Expected the config of an X-PEFT adapter in '{where}', found an invalid one: {error}. It is damaged."
        ) from error
    return config
