"""Read bottleneck adapters saved by version 1.3 of AdapterHub's `adapters` library."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ..core.hub import CONFIG_FILE, Folder, refuse_fields
from ..errors import ConfigError, FileFormatError, PeftXMaskWarning
from .trained import TrainedAdapter, site_of_projections

WEIGHTS_FILE = "adapter.safetensors"
PICKLES = ("pytorch_adapter.bin",)

_BERT_LIKE = (r"(?P<block>(?:.+\.)?encoder\.layer\.\d+)\.output", "output.dense")
_DISTILBERT = (r"(?P<block>(?:.+\.)?transformer\.layer\.\d+)\.output_adapters", "ffn.lin2")
_PLACES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "deberta", "deberta-v2"), _BERT_LIKE),
        "distilbert": _DISTILBERT,
    }
)
"""Where each architecture keeps its FFN adapters, and the module of that block whose output they read."""

_ACTIVATIONS: Mapping[str, str] = MappingProxyType(
    {
        "relu": "relu",
        "gelu": "gelu",
        "silu": "silu",
        "swish": "silu",
        "tanh": "tanh",
        "sigmoid": "sigmoid",
        "linear": "identity",
    }
)
"""Its non-linearities, by our name."""

_PARTS = {
    "adapter_down.0.weight": "down.weight",
    "adapter_down.0.bias": "down.bias",
    "adapter_up.weight": "up.weight",
    "adapter_up.bias": "up.bias",
    "scaling": "scaling",
}
_OFF = (False,)
_REFUSED: Mapping[str, tuple[Sequence[Any], str]] = {
    "architecture": ((), "it is no bottleneck adapter"),
    "mh_adapter": (_OFF, "a second adapter after the attention would be lost"),
    "cross_adapter": (_OFF, "an adapter after the cross-attention would be lost"),
    "output_adapter": ((True,), "there is no adapter after the feed-forward network"),
    "is_parallel": (_OFF, "it reads the input of the whole block, which no site of a pool does"),
    "inv_adapter": ((), "its invertible layer after the embeddings would be lost"),
    "ln_before": (_OFF, "its own LayerNorm would be lost"),
    "ln_after": (_OFF, "its own LayerNorm would be lost"),
    "use_gating": (_OFF, "its gate would be lost"),
    "phm_layer": (_OFF, "its matrices are Kronecker products"),
    "original_ln_after": ((True,), "it takes a LayerNorm out of the base model"),
}


def read_seq_bn(folder: Folder, config: Mapping[str, Any]) -> TrainedAdapter:
    """Read a `seq_bn` adapter (one after each feed-forward network) from a folder in safetensors form.

    The scaling on an adapter's output, fixed or learned, goes into ``up`` and ``up_bias``.

    Args:
        folder: a folder that `adapters` saved.
        config: its ``adapter_config.json``.

    Raises:
        ConfigError: the architecture is unknown, or the adapter has a form that a pool does not support.
        FileFormatError: a file is missing, damaged or incomplete.

    Source: the layout as `adapters` 1.3.0 writes it; see docs/pool.md.
    """
    version, name, options = config.get("version"), config.get("name"), config.get("config")
    if not (isinstance(version, str) and version.startswith("adapters.") and isinstance(name, str)):
        raise ConfigError(
            f"Expected a folder saved by `adapters` 1.x (version 'adapters.1...') in '{folder.path}', found version "
            f"{version!r}. Load the adapter with `adapters` and save it with use_safetensors=True."
        )
    if not isinstance(options, dict):
        raise FileFormatError(f"Expected an object as 'config' in '{folder.path / CONFIG_FILE}', found {options!r}.")
    activation = _check_form(folder, config["model_type"], options)
    found = _by_site(folder, name, config["model_type"])
    sites = {}
    for site, parts in found.items():
        scaling = parts.pop("scaling", None)
        factor = _number(folder, options) if scaling is None else scaling
        size = int(parts["down.weight"].shape[0]) if "down.weight" in parts else 0
        sites[site] = site_of_projections(f"'{site}' of '{folder.path}'", parts, size, True, factor)
    facts = {
        "model_type": config["model_type"],
        "activation": activation,
        "original_ln_before": options.get("original_ln_before", False),
    }
    return TrainedAdapter(folder.name, facts, sites, "sequential", activation, False)


def _check_form(folder: Folder, model_type: Any, options: Mapping[str, Any]) -> str:
    """Reject what a pool cannot represent; return our name of the activation."""
    if model_type not in _PLACES:
        raise ConfigError(
            f"Adapter '{folder.name}' was made for model_type {model_type!r}. Expected one of {sorted(_PLACES)}: for "
            "others it is not known which module its adapters belong to."
        )
    refuse_fields(folder.name, options, _REFUSED)
    if not options.get("output_adapter"):
        raise ConfigError(
            f"Adapter '{folder.name}' has no output_adapter. Expected one after the feed-forward network."
        )
    reads_norm = bool(options.get("original_ln_before", False))
    if reads_norm and options.get("residual_before_ln") is not True:
        raise ConfigError(
            f"Adapter '{folder.name}' cannot become part of a pool. residual_before_ln="
            f"{options.get('residual_before_ln')!r} with original_ln_before=True: it changes the base model's residual."
        )
    non_linearity = str(options.get("non_linearity")).lower()
    if non_linearity not in _ACTIVATIONS:
        raise ConfigError(
            f"Adapter '{folder.name}' has non_linearity={options.get('non_linearity')!r}. Expected one of "
            f"{sorted(_ACTIVATIONS)}."
        )
    if reads_norm:
        warnings.warn(
            f"Adapter '{folder.name}' was trained with original_ln_before=True: it read LayerNorm(y + x), the block's "
            "normalised sum. In a pool it reads y, the module's own output, and so does not compute what it did. Masks "
            "can be trained over such a pool, but one of its adapters alone is not the original.",
            PeftXMaskWarning,
            stacklevel=2,
        )
    return _ACTIVATIONS[non_linearity]


def _by_site(folder: Folder, name: str, model_type: str) -> dict[str, dict[str, Tensor]]:
    block, module = _PLACES[model_type]
    key_form = re.compile(rf"{block}\.adapters\.{re.escape(name)}\.(?P<part>.+)")
    sites: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in folder.read_weights(WEIGHTS_FILE, PICKLES).items():
        match = key_form.fullmatch(key)
        if match is None or match["part"] not in _PARTS:
            unknown.append(key)
        else:
            sites.setdefault(f"{match['block']}.{module}", {})[_PARTS[match["part"]]] = tensor
    if unknown or not sites:
        raise FileFormatError(
            f"Expected only tensors such as '...adapters.{name}.adapter_down.0.weight' after the feed-forward networks "
            f"in '{folder.path / WEIGHTS_FILE}', found {len(unknown)} others: {sorted(unknown)[:3]}."
        )
    return sites


def _number(folder: Folder, options: Mapping[str, Any]) -> float:
    scaling = options.get("scaling", 1.0)
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        raise FileFormatError(
            f"Adapter '{folder.name}' has scaling={scaling!r} and no such tensor in its file. Expected a number."
        )
    return scaling
