"""Evaluate a card's formulas for a model, and count the model's real parameters and bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..core.adapter_folder import ADAPTER_FILE, is_head_key
from .card import Card, card_for
from .sites import AdaptedSite, adapted_sites, base_of, blocks_of, host_of


def formula_values(
    card: Card, config: Any, base: nn.Module, sites: Sequence[AdaptedSite]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """Values of the symbols in a card's formulas: per site, per group of sites, and for the whole model."""
    common = _common_values(config, base, sites)
    if card.symbols is not None:
        common |= card.symbols(config, common)
    per_site: list[dict[str, Any]] = []
    groups: dict[str, dict[str, Any]] = {}
    for site in sites:
        values = _site_values(card, config, site)
        groups.setdefault(card.group_of(site.name), values)
        per_site += [values | _of_matrix(*each) for each in site.matrices] or [values]
    return per_site, list(groups.values()), common


def expected_parameters(model: Any, adapter_name: str = "default") -> int:
    """Trainable parameters of an adapter according to its card's formula."""
    return _evaluated(model, adapter_name, "trainable")


def expected_bytes(model: Any, adapter_name: str = "default") -> int:
    """Bytes of an adapter's saved tensors according to its card's formula."""
    return _evaluated(model, adapter_name, "stored")


def trainable_parameters(model: nn.Module) -> int:
    """Count the trainable parameters, each shared tensor once, without ``modules_to_save``."""
    kept_whole = _saved_whole(model)
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(f".{part}." in name for part in kept_whole)
    )


def stored_bytes(folder: Path, saved_whole: Sequence[str] = ()) -> int:
    """Bytes of the method's own tensors in an adapter folder, without heads."""
    from ..core.files import read_tensors

    tensors, _ = read_tensors(folder / ADAPTER_FILE)
    return sum(tensor.nbytes for key, tensor in tensors.items() if not is_head_key(key, saved_whole))


def _evaluated(model: Any, adapter_name: str, formula: str) -> int:
    config = model.peft_config[adapter_name]
    card = card_for(config)
    sites = adapted_sites(model, adapter_name)
    total: int = getattr(card, formula).total(*formula_values(card, config, base_of(model), sites))
    return total


def _saved_whole(model: Any) -> set[str]:
    configs = getattr(model, "peft_config", {}).values()
    return {name for config in configs for name in getattr(config, "modules_to_save", None) or ()}


def _common_values(config: Any, base: nn.Module, sites: Sequence[AdaptedSite]) -> dict[str, Any]:
    values: dict[str, Any] = {
        name: value for name, value in vars(config).items() if isinstance(value, (bool, int, float))
    }
    if sites:
        values |= {
            "d_in_max": max(site.d_in for site in sites),
            "d_out_max": max(site.d_out for site in sites),
            "d_min_max": max(min(site.d_in, site.d_out) for site in sites),
            "d_max_max": max(max(site.d_in, site.d_out) for site in sites),
        }
    whole: Any = base
    embedding = whole.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
    width = getattr(getattr(embedding, "weight", None), "shape", (None,))[-1]
    return {**values, "S": len(sites), "d": width, **_block_values(base)}


def _block_values(base: nn.Module) -> Mapping[str, Any]:
    """Parameters of one block, of the final norm and of extra embeddings, without those that adapters add."""
    names = blocks_of(base)
    if not names:
        return {}
    block = base.get_submodule(names[0])
    own = sum(parameter.numel() for name, parameter in block.named_parameters() if "shadow_" not in name)
    parent = base.get_submodule(names[0].rpartition(".")[0].rpartition(".")[0])
    tables = [
        module
        for name, module in parent.named_children()
        if isinstance(host_of(module), nn.Embedding) and name != "embed_tokens"
    ]
    norms = [module for name, module in parent.named_children() if "norm" in name or name == "ln_f"]
    return {
        "block_parameters": own,
        "other_embedding_parameters": sum(parameter.numel() for table in tables for parameter in table.parameters()),
        "final_norm_parameters": sum(parameter.numel() for norm in norms for parameter in norm.parameters()),
    }


def _of_matrix(outputs: int, width: int) -> dict[str, Any]:
    """A parameter that is adapted in its own right counts as a weight without a bias."""
    return {"d_in": width, "d_out": outputs, "bias": False, "parameters": outputs * width, "on_weight": True}


def _site_values(card: Card, config: Any, site: AdaptedSite) -> dict[str, Any]:
    values: dict[str, Any] = {
        "d_in": site.d_in,
        "d_out": site.d_out,
        "bias": site.bias,
        "names": site.names,
        "parameters": site.parameters,
    }
    return values | dict(card.site_symbols(config, site.name) if card.site_symbols is not None else {})
