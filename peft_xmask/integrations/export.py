"""Write linear adapters as standard LoRAs, for tools that load nothing else (vLLM, diffusers)."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..bank.bake import BakedLora
from ..core.adapter_folder import is_head_key
from ..errors import ConfigError, MergeError, PeftXMaskWarning
from ..tuners.sites.layer import SiteLayer
from ..tuners.xpeft.keys import OFFSET_BITS


@torch.no_grad()
def export_lora(model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Write a linear adapter as a LoRA of rank b that plain PEFT loads without this package.

    Parallel: ``lora_A = down``, ``lora_B = up``. Sequential: ``lora_A = down W``, ``lora_B = up``. What the adapter
    adds whatever its input (``up (down c + down_bias) + up_bias``, c the module's bias) goes to the bias of ``lora_B``
    (``lora_bias=True``) where there is any; vLLM refuses that field. Of an adapter with several profiles, the one
    chosen by ``set_profile`` is written. Modules saved whole (a head) come along. ``ProfileBank.to_lora`` writes the
    same without a model.

    Args:
        model: a PEFT model with an X-PEFT or bottleneck adapter.
        path: folder to write.
        adapter_name: which adapter.

    Raises:
        ConfigError: no such adapter.
        MergeError: an adapter that is not linear (``activation="identity"`` without ``layer_norm`` is) or has offsets,
            or a quantised base under a sequential one.

    Source: ours; LoRA (arXiv 2106.09685).
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    sites = _sites(model, adapter_name)
    if config is None or not sites:
        raise ConfigError(f"Expected a model with one of our adapters named '{adapter_name}', found none.")
    if "+" in (config.base_fingerprint or ""):
        warnings.warn(
            f"Adapter '{adapter_name}' was trained over a LoRA, which the export does not contain: it is right only "
            "on a model in which that LoRA is active too, or merged.",
            PeftXMaskWarning,
            stacklevel=2,
        )
    changes = {}
    for name, layer in sites:
        if reason := layer.why_no_lora(adapter_name):
            raise MergeError(f"Cannot export '{name}' as a LoRA: {reason}")
        changes[name] = layer.linear_change(adapter_name)
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name)
    if any(OFFSET_BITS in key for key in saved):
        raise MergeError(
            f"The profiles of '{adapter_name}' have offsets, which are added to what the head says and have no "
            "place in a LoRA. Serve them with ProfileBank.attach."
        )
    BakedLora.of(
        changes,
        config,
        fan_in_fan_out=isinstance(sites[0][1].get_base_layer(), Conv1D),
        shared={key: value for key, value in saved.items() if is_head_key(key, config.modules_to_save or ())},
    ).save_pretrained(path)


def _sites(model: nn.Module, adapter_name: str) -> list[tuple[str, SiteLayer]]:
    root: Any = getattr(model, "base_model", model)
    root = root.model if hasattr(root, "targeted_module_names") else model
    return [
        (name, layer)
        for name, layer in root.named_modules()
        if isinstance(layer, SiteLayer) and layer.form(adapter_name) is not None
    ]
