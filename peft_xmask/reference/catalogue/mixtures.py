"""Routers over several modules, and a network beside the base network."""

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
d, width, block_parameters = symbols("d update_width block_parameters")

ROUTED: dict[str, Any] = {
    **WEIGHT_CHANGE,
    "inter_connectivity": InterConnectivity.DYNAMIC,
    "integration_form": IntegrationForm.GATED_ADDITION,
    "merges": False,
}
ROUTER_UNCHECKED = {
    **INTER_UNCHECKED,
    "integration_form": "a router's weights are never all zero, so the gate cannot be closed",
}

add_card(
    "LILY",
    "Lily",
    "arXiv 2407.09946",
    ROUTED,
    parameters_adapted=ParametersAdapted.ADDITION,
    parameter_sharing=ParameterSharing.SHARED,
    trainable=per_site(r * d_in / stride_A + num_B * r, group=num_B * r * d_out),
    stored=in_float32(per_site(r * d_in + num_B * r + num_B * r * d_out)),
    reasons={
        "trainable": "stride_A neighbouring layers share one A; exact if stride_A divides their number",
        "stored": "the file holds the shared tensors once per site",
        "inter_connectivity": "a router weights the B matrices by the batch's hidden states",
    },
    unchecked=ROUTER_UNCHECKED,
)

POLY_TRAINED = per_site(n_skills * r * (d_in + d_out) + n_tasks * n_skills * n_splits)
add_card(
    "POLY",
    "Poly",
    "arXiv 2202.13914",
    ROUTED,
    trainable=POLY_TRAINED,
    stored=in_float32(POLY_TRAINED),
    reasons={
        "inter_connectivity": "a task's row in the router selects the skills; in training it is sampled",
        "merges": "PEFT does not merge it, although one task's mix of skills is a low-rank change",
        "supports_mixed_batch": "not through adapter_names; task_ids mixes tasks of one adapter in a batch",
        "parameters_adapted": "one task's mix of skills is a low-rank change of the weight",
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
    trainable=once((hidden_size + 1) * router_outputs),
    stored=once(0),
    symbols=_xlora_sizes,
    several=False,
    adds_up=False,
    needs="adapters, hidden_size; base.config.use_cache = False",
    reasons={
        "trainable": "the router with xlora_depth=1, the default; the LoRA adapters are frozen",
        "parameter_sharing": "one router for all sites",
        "workspace": "the workspace of its LoRA adapters",
        "stored": "PEFT 0.21.2 omits the router from the file, because it mistakes the router's layer index for LoRA "
        "adapter 0. The LoRA adapters have their own files",
    },
    unchecked=ROUTER_UNCHECKED,
)


def _shadow_sizes(config: PeftConfig, known: Mapping[str, Any]) -> Mapping[str, Any]:
    given: Any = config
    return {"update_width": given.update_hidden_size or given.r, "depth": given.shadow_num_hidden_layers or 1}


depth, final_norm, tables = symbols("depth final_norm_parameters other_embedding_parameters")
SHADOW_TRAINED = per_site(
    2 * r * d + 2 * (2 * width * d + width + d), once=depth * block_parameters + final_norm + tables
)
add_card(
    "SHADOW",
    "ShadowPEFT",
    "arXiv 2604.19254",
    ROUTED,
    integration_form=IntegrationForm.SCALED_ADDITION,
    parameters_adapted=ParametersAdapted.ADDITION,
    parameter_sharing=ParameterSharing.SHARED,
    workspace=frozenset({Workspace.BLOCK}),
    trainable=SHADOW_TRAINED,
    stored=in_float32(SHADOW_TRAINED),
    symbols=_shadow_sizes,
    adds_up=False,
    scale="shadow_alpha",
    reasons={
        "parameter_sharing": "one shadow network runs beside all blocks",
        "inter_connectivity": "gates decide from the input how far the shadow follows the base",
        "trainable": "with a mirrored shadow network of the base's width, the default; it has its own embeddings if "
        "the base's are not called embed_tokens, as in GPT-2",
    },
    unchecked={
        **INTER_UNCHECKED,
        "intra_connectivity": "the site is a block, not a linear module",
        "insertion_form": "the site is a block, not a linear module",
        "integration_form": "the shadow reads what it changes, so doubling the constant does not double the change",
        "input_type": "the site is a block, not a linear module",
    },
)
