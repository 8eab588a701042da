"""Write a magnitude-masked adapter as positions and values, for tools that do not know masks."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..core.files import write_tensors
from ..errors import ConfigError
from ..tuners.magnitude_mask import MagnitudeMaskLayer

FORMAT = "sparse-delta-1"


def export_sparse_delta(model: nn.Module, path: str | Path, adapter_name: str = "default") -> None:
    """Write what an adapter adds to the base's parameters.

    For each parameter, by its name in the base model: ``<name>.indices``, int64 ``[n]``, ascending positions in the
    flat parameter, and ``<name>.values``, float32 ``[n]``, to be added there. The file's metadata has
    ``format_version = "sparse-delta-1"`` and ``base_fingerprint``. Modules that are saved whole, such as a head, are
    not in it.

    Args:
        model: the model with the adapter, wrapped by PEFT or not.
        path: of the file.

    Raises:
        ConfigError: the model has no magnitude-masked adapter of that name.
    """
    root = model.get_base_model() if isinstance(model, PeftModel) else model
    tensors: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, layer in root.named_modules():
            if isinstance(layer, MagnitudeMaskLayer) and layer.has(adapter_name):
                for change in layer.changes(adapter_name):
                    assert change.indices is not None
                    tensors[f"{name}.{change.name}.indices"] = change.indices.index.cpu()
                    tensors[f"{name}.{change.name}.values"] = change.delta.detach().cpu().float()
    if not tensors:
        raise ConfigError(
            f"Expected a model with a magnitude-masked adapter '{adapter_name}', found a {type(model).__name__} "
            "without one. Check adapter_name."
        )
    fingerprint = model.peft_config[adapter_name].base_fingerprint  # type: ignore[union-attr, index]
    write_tensors(Path(path), tensors, {"format_version": FORMAT, "base_fingerprint": str(fingerprint)})
