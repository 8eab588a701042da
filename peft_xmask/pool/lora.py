"""Read LoRA adapters that PEFT saved."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..core.hub import CONFIG_FILE, Folder, refuse_fields
from ..errors import ConfigError, FileFormatError
from .trained import SiteTensors, TrainedAdapter

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLES = ("adapter_model.bin",)
FILENAMES = (CONFIG_FILE, WEIGHTS_FILE)

_KEY = re.compile(r"(?:base_model\.model\.)?(?P<site>.+)\.lora_(?P<side>[AB])\.weight")
_OFF: Sequence[Any] = (False, 0, "none", [], {})
_REFUSED: Mapping[str, tuple[Sequence[Any], str]] = {
    "use_dora": (_OFF, "DoRA rescales the base weight, which no sum of low-rank matrices does"),
    "rank_pattern": (_OFF, "all sites must have one rank"),
    "bias": (_OFF, "it changes biases of the base model"),
    "lora_bias": (_OFF, "a bias on lora_B has no place in a LoRA pool"),
    "use_bdlora": (_OFF, "its matrices are block-diagonal"),
    "use_qalora": (_OFF, "it pools its inputs"),
    "layer_replication": (_OFF, "it changes the layers of the base model"),
    "target_parameters": (_OFF, "it adapts parameters, not linear modules"),
    "trainable_token_indices": (_OFF, "it changes the embeddings"),
    "alora_invocation_tokens": (_OFF, "it is active for a part of the tokens only"),
    "arrow_config": (_OFF, "it routes between adapters"),
    "kasa_config": (_OFF, "it changes the base weights"),
    "monteclora_config": (_OFF, "its matrices are sampled"),
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
_VARIANT_KEYS = {
    ".lora_embedding_": "an adapted embedding",
    ".lora_magnitude_vector": "DoRA",
    ".lora_B.bias": "lora_bias",
}


def read_lora(folder: Folder) -> TrainedAdapter:
    """Read a LoRA: ``down = lora_A [r, d_in]``, ``up = scale * lora_B [d_out, r]``.

    ``scale`` is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with rsLoRA, with ``alpha_pattern`` applied; the
    product is rounded once to the dtype of ``lora_B``. ``modules_to_save`` (a head) are left out.

    Raises:
        ConfigError: it has another PEFT type, or is a LoRA variant with more than two matrices per site.
        FileFormatError: a file is missing, damaged or incomplete.
    """
    config = folder.read_json(CONFIG_FILE)
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"Expected a LoRA (peft_type 'LORA') in '{folder.path}', found {config.get('peft_type')!r}.")
    refuse_fields(folder.name, config, _REFUSED)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise ConfigError(
            f"Adapter '{folder.name}' has init_lora_weights={start!r} and so belongs to changed base weights. Save it "
            "with path_initial_model_for_weight_conversion, which makes it a LoRA of the original ones."
        )
    weights = folder.read_weights(WEIGHTS_FILE, PICKLES)
    sites = {name: _site(folder, name, sides, config) for name, sides in _by_site(folder, weights).items()}
    ranks = sorted({int(site.down.shape[0]) for site in sites.values()})
    if len(ranks) > 1:
        raise ConfigError(f"Expected one rank at all sites of adapter '{folder.name}', found {ranks}.")
    return TrainedAdapter(folder.name, {"r": ranks[0]}, sites, "parallel", "identity", False)


def _by_site(folder: Folder, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    sites: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        variant = next((words for part, words in _VARIANT_KEYS.items() if part in key), None)
        if variant is not None:
            raise ConfigError(f"Adapter '{folder.name}' cannot become part of a pool: '{key}' is {variant}.")
        if match := _KEY.fullmatch(key):
            sites.setdefault(match["site"], {})[match["side"]] = tensor
    if not sites:
        raise FileFormatError(
            f"Expected tensors such as 'base_model.model.<site>.lora_A.weight' in '{folder.path / WEIGHTS_FILE}', "
            f"found {sorted(weights)[:3]}. The file is not a LoRA as PEFT saves it."
        )
    return sites


def _site(folder: Folder, name: str, sides: Mapping[str, Tensor], config: Mapping[str, Any]) -> SiteTensors:
    a, b = sides.get("A"), sides.get("B")
    if a is None or b is None:
        raise FileFormatError(
            f"Expected lora_A and lora_B at '{name}' in '{folder.path}', found lora_{next(iter(sides))} only."
        )
    if a.dim() != 2 or b.dim() != 2:
        raise ConfigError(
            f"Expected linear modules, found lora_A of shape {tuple(a.shape)} and lora_B of shape {tuple(b.shape)} at "
            f"'{name}' of adapter '{folder.name}'. Adapters of convolutions cannot become part of a pool."
        )
    rank = int(a.shape[0])
    if b.shape[1] != rank:
        raise FileFormatError(
            f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} at '{name}' of '{folder.path}' do not fit."
        )
    scale = _alpha(folder, name, config) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return SiteTensors(down=a, up=(b.float() * scale).to(b.dtype))


def _alpha(folder: Folder, name: str, config: Mapping[str, Any]) -> float:
    """``lora_alpha`` at a site: the first match in ``alpha_pattern``, found as PEFT does, else the common one."""
    patterns = config.get("alpha_pattern") or {}
    matching = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name))
    alpha = next(matching, config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise FileFormatError(f"Expected a number as lora_alpha in '{folder.path / CONFIG_FILE}', found {alpha!r}.")
    return alpha
