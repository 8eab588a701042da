"""Read bottleneck adapters: those that PEFT saved for our method, and AdapterHub's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..core.adapter import ACTIVATIONS
from ..core.hub import CONFIG_FILE, Folder
from ..errors import ConfigError, FileFormatError
from . import adapterhub
from .trained import TrainedAdapter, site_of_projections

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLES = ("adapter_model.bin",)
FILENAMES = (CONFIG_FILE, WEIGHTS_FILE, adapterhub.WEIGHTS_FILE)

_KEY = re.compile(r"(?:base_model\.model\.)?(?P<site>.+)\.bottleneck_adapter_(?P<part>(?:down|up)\.(?:weight|bias))")
_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "bottleneck_size": (lambda x: type(x) is int and x >= 1, "a whole number of at least 1"),
    "activation": (lambda x: isinstance(x, str) and x in ACTIVATIONS, f"one of {sorted(ACTIVATIONS)}"),
    "layer_norm": (lambda x: type(x) is bool, "true or false"),
    "insertion_form": (lambda x: x in ("sequential", "parallel"), "'sequential' or 'parallel'"),
    "use_bias": (lambda x: type(x) is bool, "true or false"),
    "scale": (lambda x: type(x) in (int, float), "a number"),
}


def read_bottleneck(folder: Folder) -> TrainedAdapter:
    """Read a bottleneck adapter of ours, or an AdapterHub folder.

    The ``scale`` on an adapter's output goes into ``up`` and ``up_bias``, with one rounding to their dtype.

    Raises:
        ConfigError: it is another kind of adapter, or has a form that a pool does not support.
        FileFormatError: a file is missing, damaged or incomplete.
    """
    config = folder.read_json(CONFIG_FILE)
    if config.get("peft_type") == "BOTTLENECK_ADAPTER":
        return _read_own(folder, config)
    if "peft_type" not in config and "config" in config and "model_type" in config:
        return adapterhub.read_seq_bn(folder, config)
    raise ConfigError(
        f"Expected a bottleneck adapter in '{folder.path}': peft_type 'BOTTLENECK_ADAPTER', or a folder that "
        f"AdapterHub's `adapters` saved. Found peft_type {config.get('peft_type')!r}. For LoRA "
        "adapters use AdapterPool.from_lora."
    )


def _read_own(folder: Folder, config: Mapping[str, Any]) -> TrainedAdapter:
    for name, (fits, expected) in _FIELDS.items():
        if not fits(config.get(name)):
            raise FileFormatError(
                f"Expected {name} to be {expected} in '{folder.path / CONFIG_FILE}', found {config.get(name)!r}."
            )
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in folder.read_weights(WEIGHTS_FILE, PICKLES).items():
        if match := _KEY.fullmatch(key):
            found.setdefault(match["site"], {})[match["part"]] = tensor
    if not found:
        raise FileFormatError(
            "Expected tensors such as 'base_model.model.<site>.bottleneck_adapter_down.weight' in "
            f"'{folder.path / WEIGHTS_FILE}', found none."
        )
    sites = {
        name: site_of_projections(
            f"'{name}' of '{folder.path}'", parts, config["bottleneck_size"], config["use_bias"], config["scale"]
        )
        for name, parts in found.items()
    }
    facts = {name: config[name] for name in _FIELDS if name != "scale"}
    facts["base_fingerprint"] = config.get("base_fingerprint")
    return TrainedAdapter(
        folder.name, facts, sites, config["insertion_form"], config["activation"], config["layer_norm"]
    )
