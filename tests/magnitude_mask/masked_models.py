"""Looking into models with a magnitude mask."""

import torch
from peft import PeftModel
from torch import Tensor


def values_of(model: torch.nn.Module, adapter_name: str = "default") -> Tensor:
    """What is trained."""
    root = model.get_base_model() if isinstance(model, PeftModel) else model
    return root.delta_table.magnitude_mask_values[adapter_name].weight


def logits(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def layers_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Adapted layers by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "magnitude_mask_masks")}


def base_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """The adapted modules' parameters as they lie in memory, copied."""
    return {
        f"{name}.{each}": parameter.detach().clone()
        for name, layer in layers_of(model).items()
        for each, parameter in layer.get_base_layer().named_parameters()
    }


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
