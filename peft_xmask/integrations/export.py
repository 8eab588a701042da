"""Linear adapters as stock LoRAs, for tools that read nothing else (vLLM, diffusers)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.adapter_folder import ADAPTER_FILE, is_head_key
from ..core.files import write_tensors
from ..errors import ConfigError, MergeError
from ..tuners.sites.layer import SiteLayer

PREFIX = "base_model.model."


@torch.no_grad()
def export_lora(model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Write a linear adapter as a LoRA of rank b that plain PEFT loads without this package.

    Parallel: ``lora_A = down``, ``lora_B = up``. Sequential: ``lora_A = down W``, ``lora_B = up``. What the adapter
    adds whatever its input (``up (down c + down_bias) + up_bias``, c the module's bias) goes to the bias of ``lora_B``
    (``lora_bias=True``) where there is any; vLLM and diffusers do not read that field. Of an adapter with several
    profiles, the one chosen by ``set_profile``. Modules saved whole (a head) come along.

    Args:
        model: a PEFT model with an X-PEFT or bottleneck adapter.
        path: folder to write.
        adapter_name: which adapter.

    Raises:
        ConfigError: no such adapter.
        MergeError: an adapter that is not linear (``activation="identity"`` without ``layer_norm`` is), or a quantised
            base under a sequential one.

    Source: ours; LoRA (arXiv 2106.09685).
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    sites = _sites(model, adapter_name)
    if config is None or not sites:
        raise ConfigError(f"Expected a model with one of our adapters named '{adapter_name}', found none.")
    tensors: dict[str, Tensor] = {}
    for name, layer in sites:
        if reason := layer.why_not_linear(adapter_name):
            raise MergeError(f"Cannot export '{name}' as a LoRA: {reason}")
        tensors.update({f"{PREFIX}{name}.{part}": tensor for part, tensor in _as_lora(layer, adapter_name).items()})
    has_bias = any(key.endswith("lora_B.bias") for key in tensors)
    for name, layer in sites if has_bias else ():
        key = f"{PREFIX}{name}.lora_B"
        tensors.setdefault(f"{key}.bias", tensors[f"{key}.weight"].new_zeros(layer.out_features))
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name)
    tensors.update({key: value for key, value in saved.items() if is_head_key(key, config.modules_to_save or ())})
    rank = tensors[f"{PREFIX}{sites[0][0]}.lora_A.weight"].shape[0]
    lora = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_bias=has_bias,
        target_modules=[name for name, _ in sites],
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        fan_in_fan_out=isinstance(sites[0][1].get_base_layer(), Conv1D),
        inference_mode=True,
    )
    folder = Path(path)
    write_tensors(folder / ADAPTER_FILE, {key: tensor.cpu() for key, tensor in tensors.items()})
    lora.save_pretrained(str(folder))


def _sites(model: nn.Module, adapter_name: str) -> list[tuple[str, SiteLayer]]:
    root: Any = getattr(model, "base_model", model)
    root = root.model if hasattr(root, "targeted_module_names") else model
    return [
        (name, layer)
        for name, layer in root.named_modules()
        if isinstance(layer, SiteLayer) and layer.form(adapter_name) is not None
    ]


def _as_lora(layer: SiteLayer, adapter_name: str) -> dict[str, Tensor]:
    down, up, constant = layer.linear_change(adapter_name)
    tensors = {"lora_A.weight": down.float().clone(), "lora_B.weight": up.float().clone()}
    return tensors if constant is None else {**tensors, "lora_B.bias": constant.float().clone()}
