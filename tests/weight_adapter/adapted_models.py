"""Looking into models with a weight adapter."""

import torch
from peft import PeftModel
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from peft_xmask.core.adapter import ACTIVATIONS
from peft_xmask.tuners.weight_adapter import WeightAdapterLayer


def logits(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def layers_of(model: torch.nn.Module) -> dict[str, WeightAdapterLayer]:
    """Adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, WeightAdapterLayer)}


def base_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """The adapted modules' parameters as they lie in memory, copied."""
    return {
        f"{name}.{each}": parameter.detach().clone()
        for name, layer in layers_of(model).items()
        for each, parameter in layer.get_base_layer().named_parameters()
    }


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def stored(model: torch.nn.Module, adapter_name: str = "default") -> Tensor:
    """What an adapter has in the table."""
    root = model.get_base_model() if isinstance(model, PeftModel) else model
    return root.delta_table.weight_adapter_delta[adapter_name].weight


def formula(layer: WeightAdapterLayer, parameter: str, own: Tensor, activation: str, scale: float) -> Tensor:
    """``s f(X D + c) U``, written down once more."""
    factors = layer.factors("default")
    down, up = (factors[f"weight_adapter_{parameter}_{name}"] for name in ("down", "up"))
    fan_in_fan_out = parameter == "weight" and isinstance(layer.get_base_layer(), Conv1D)
    rows = own[None] if own.dim() == 1 else own.t() if fan_in_fan_out else own.flatten(1)
    inner = rows @ down + factors.get(f"weight_adapter_{parameter}_shift", 0.0)
    change = scale * ACTIVATIONS[activation](inner) @ up
    return (change.t() if fan_in_fan_out else change).reshape(own.shape)
