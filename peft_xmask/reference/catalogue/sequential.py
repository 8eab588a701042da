"""Rotations, scales and other methods applied before or after a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftConfig

from ..card import add_card, in_float32
from ..formula import per_site, symbols
from ..vocabulary import InputType, IntegrationForm, IntraConnectivity, Workspace
from .kinds import ORTHOGONAL, d_in, d_out, r

oft_block_size, boft_block_size, boft_n_butterfly_factor = symbols(
    "oft_block_size boft_block_size boft_n_butterfly_factor"
)
feedforward, variant_width = symbols("feedforward variant_width")


def _is_feedforward(config: PeftConfig, name: str) -> Mapping[str, Any]:
    chosen: Any = config
    names = chosen.feedforward_modules or ()
    return {"feedforward": any(name.endswith(each) for each in names)}


def _road_width(config: PeftConfig, _: Mapping[str, Any]) -> Mapping[str, Any]:
    chosen: Any = config
    return {"variant_width": {"road_1": 1, "road_2": 2, "road_4": 4}[chosen.variant]}


SPARSE = {**ORTHOGONAL, "intra_connectivity": IntraConnectivity.SPARSE}

OFT_TRAINED = per_site(d_in * (oft_block_size - 1) / 2)
add_card(
    "OFT",
    "OFT",
    "arXiv 2306.07280",
    SPARSE,
    trainable=OFT_TRAINED,
    stored=in_float32(OFT_TRAINED),
    needs="oft_block_size that divides every width",
    reasons={"intra_connectivity": "a block-diagonal rotation: an input reaches only the outputs of its block"},
)

BOFT_TRAINED = per_site(boft_n_butterfly_factor * d_in * boft_block_size + d_out)
add_card(
    "BOFT",
    "BOFT",
    "arXiv 2311.06243",
    SPARSE,
    trainable=BOFT_TRAINED,
    stored=in_float32(BOFT_TRAINED),
    needs="boft_block_size that divides every width",
    reasons={
        "intra_connectivity": "as OFT with one butterfly factor, the default; more factors connect more",
        "integration_form": "a rotation of the input and a scale per output",
    },
)

HRA_TRAINED = per_site(r * d_in)
add_card(
    "HRA",
    "HRA",
    "arXiv 2405.17484",
    ORTHOGONAL,
    trainable=HRA_TRAINED,
    stored=in_float32(HRA_TRAINED),
)

ROAD_TRAINED = per_site(variant_width * d_out)
add_card(
    "ROAD",
    "RoAd",
    "arXiv 2409.00119",
    SPARSE,
    trainable=ROAD_TRAINED,
    stored=in_float32(ROAD_TRAINED),
    supports_mixed_batch=True,
    symbols=_road_width,
    needs="group_size that divides every output width",
    reasons={"intra_connectivity": "rotations and scales of pairs of outputs"},
)

IA3_TRAINED = per_site(feedforward * d_in + (1 - feedforward) * d_out)
add_card(
    "IA3",
    "(IA)^3",
    "arXiv 2205.05638",
    SPARSE,
    integration_form=IntegrationForm.RESCALING,
    workspace=frozenset({Workspace.ATTENTION_KEY, Workspace.ATTENTION_VALUE, Workspace.FFN_OUTPUT}),
    trainable=IA3_TRAINED,
    stored=in_float32(IA3_TRAINED),
    site_symbols=_is_feedforward,
    reasons={"parameters_adapted": "it can be merged: scaling a projection is a change of its weight"},
)

BEFT_TRAINED = per_site(d_out)
add_card(
    "BEFT",
    "BEFT",
    "arXiv 2509.15974",
    SPARSE,
    integration_form=IntegrationForm.DIRECT_ADDITION,
    input_type=InputType.NONE,
    workspace=frozenset({Workspace.ATTENTION_VALUE}),
    merges=False,
    trainable=BEFT_TRAINED,
    stored=in_float32(BEFT_TRAINED),
    reasons={
        "merges": "only if the host has a bias, as in BERT; Llama's projections have none",
        "parameters_adapted": "it encodes a change of the host's bias, which may be an implicit zero",
        "insertion_form": "added after the projection, whether or not the projection has a bias",
        "intra_connectivity": "nothing is connected: one value per output",
    },
)
