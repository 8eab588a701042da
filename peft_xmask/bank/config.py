"""The config of a bank's profiles, read from a file that is not trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..core.masks import MASK_NORMS
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


def config_of(fields: Mapping[str, Any], where: str) -> XPEFTConfig:
    """The config that these fields make: that of an adapter which was made, so that nothing is left to be resolved.

    Args:
        where: they come from, for errors.

    Raises:
        FileFormatError: of another method, or a value that cannot be.
    """
    if fields.get("peft_type") != "XPEFT":
        raise FileFormatError(
            f"Expected the config of an X-PEFT adapter in '{where}', found one of {fields.get('peft_type')!r}."
        )
    try:
        config: XPEFTConfig = XPEFTConfig.from_peft_type(**fields)
        require_positive("top_k", config.top_k)
        require_choice("mask_norm", config.mask_norm, MASK_NORMS)
        for name, kinds in _KINDS.items():
            if not isinstance(getattr(config, name), kinds):
                raise ValueError(f"{name}={getattr(config, name)!r} is not possible")
        if config.scale is None or not math.isfinite(config.scale):
            raise ValueError(f"scale={config.scale!r} is not possible")
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise FileFormatError(
            f"Expected the config of an X-PEFT adapter in '{where}', found one that cannot be: {error}. It is damaged."
        ) from error
    return config
