"""Routers over several modules, and a network beside the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftConfig

from ..card import add_card, in_float32
from ..formula import once, per_site, symbols
from ..vocabulary import IntegrationForm, InterConnectivity, ParametersAdapted, ParameterSharing, Workspace
from .kinds import INTER_UNCHECKED, WEIGHT_CHANGE, d_in, d_out, r

num_B, stride_A, n_tasks, n_skills, n_splits = symbols("num_B stride_A n_tasks n_skills n_splits")
hidden_size, router_outputs = symbols("hidden_size router_outputs")
d, width, block_numbers = symbols("d update_width block_numbers")

ROUTED: dict[str, Any] = {
    **WEIGHT_CHANGE,
    "inter_connectivity": InterConnectivity.DYNAMIC,
    "integration_form": IntegrationForm.GATED_ADDITION,
    "merges": False,
}
ROUTER_UNCHECKED = {
    **INTER_UNCHECKED,
    "integration_form": "a router's weights are never all zero, so that the gate cannot be closed",
}

add_card(
    "LILY",
    "Lily",
    "arXiv 2407.09946",
    ROUTED,
    parameters_adapted=ParametersAdapted.ADDITION,
    parameter_sharing=ParameterSharing.SHARED,
    trained=per_site(r * d_in / stride_A + num_B * r, group=num_B * r * d_out),
    stored=in_float32(per_site(r * d_in + num_B * r + num_B * r * d_out)),
    reasons={
        "trained": "stride_A neighbouring layers share one A; exact where it divides their number",
        "stored": "what layers share is written at every site",
        "inter_connectivity": "a router weighs the B's by the batch's hidden states",
    },
    unchecked=ROUTER_UNCHECKED,
)

POLY_TRAINED = per_site(n_skills * r * (d_in + d_out) + n_tasks * n_skills * n_splits)
add_card(
    "POLY",
    "Poly",
    "arXiv 2202.13914",
    ROUTED,
    trained=POLY_TRAINED,
    stored=in_float32(POLY_TRAINED),
    reasons={
        "inter_connectivity": "a task's row of the router chooses the skills, in training by sampling",
        "merges": "PEFT does not, though for one task the mix of skills is a low-rank change",
        "mixes": "not by adapter_names; a batch mixes tasks of one adapter by task_ids",
        "parameters_adapted": "for a task the mix of skills is a low-rank change of the weight",
    },
    unchecked=ROUTER_UNCHECKED,
)


def _xlora_sizes(config: PeftConfig, known: Mapping[str, Any]) -> Mapping[str, Any]:
    given: Any = config
    count = len(given.adapters)
    outputs = count * (int(known["S"]) if given.layerwise_scalings else 1)
    return {"router_outputs": outputs}


add_card(
    "XLORA",
    "X-LoRA",
    "arXiv 2402.07148",
    ROUTED,
    parameters_adapted=ParametersAdapted.ADDITION,
    parameter_sharing=ParameterSharing.SHARED,
    trained=once((hidden_size + 1) * router_outputs),
    stored=once(0),
    symbols=_xlora_sizes,
    several=False,
    adds_up=False,
    needs="adapters, hidden_size; base.config.use_cache = False",
    reasons={
        "trained": "the router, with xlora_depth=1, the default; the LoRA adapters are frozen",
        "parameter_sharing": "one router for all sites",
        "workspace": "that of its LoRA adapters",
        "stored": "PEFT 0.21.2 leaves the router out of the file: it takes the index of its layer for the name of LoRA "
        "adapter 0. Those adapters are files of their own",
    },
    unchecked=ROUTER_UNCHECKED,
)


def _shadow_sizes(config: PeftConfig, known: Mapping[str, Any]) -> Mapping[str, Any]:
    given: Any = config
    return {"update_width": given.update_hidden_size or given.r, "depth": given.shadow_num_hidden_layers or 1}


depth, final_norm, tables = symbols("depth final_norm_numbers other_embedding_numbers")
SHADOW_TRAINED = per_site(2 * r * d + 2 * (2 * width * d + width + d), once=depth * block_numbers + final_norm + tables)
add_card(
    "SHADOW",
    "ShadowPEFT",
    "arXiv 2604.19254",
    ROUTED,
    integration_form=IntegrationForm.SCALED_ADDITION,
    parameters_adapted=ParametersAdapted.ADDITION,
    parameter_sharing=ParameterSharing.SHARED,
    workspace=frozenset({Workspace.BLOCK}),
    trained=SHADOW_TRAINED,
    stored=in_float32(SHADOW_TRAINED),
    symbols=_shadow_sizes,
    adds_up=False,
    scale="shadow_alpha",
    reasons={
        "parameter_sharing": "one shadow network rides along all blocks",
        "inter_connectivity": "gates decide by the input how far the shadow follows the base",
        "trained": "with a mirrored shadow network of the base's width, the default; embeddings that are not called "
        "embed_tokens, as in GPT-2, it has for itself",
    },
    unchecked={
        **INTER_UNCHECKED,
        "intra_connectivity": "the site is a block, not a linear module",
        "insertion_form": "the site is a block, not a linear module",
        "integration_form": "the shadow reads what it changes, so that a doubled constant does not double the change",
        "input_type": "the site is a block, not a linear module",
    },
)
