"""The methods of this package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftConfig

from ..card import add_card, in_float32
from ..formula import ceil, nearest, per_site, symbols
from ..vocabulary import (
    InputType,
    InsertionForm,
    IntegrationForm,
    InterConnectivity,
    IntraConnectivity,
    ParametersAdapted,
    ParameterSharing,
    Workspace,
)
from .kinds import ALL_LINEAR, INTER_UNCHECKED, WEIGHT_CHANGE, bias, d_in, d_out, r

b, use_bias, parallel, N, P = symbols("bottleneck_size use_bias parallel num_adapters num_profiles")
learn_gain, soft, density, include_bias, value_bytes = symbols("learn_gain soft density include_bias value_bytes")


def _form(config: PeftConfig, _: Mapping[str, Any]) -> Mapping[str, Any]:
    given: Any = config
    return {"parallel": given.insertion_form == "parallel"}


def _kind_of_mask(config: PeftConfig, _: Mapping[str, Any]) -> Mapping[str, Any]:
    given: Any = config
    return {"soft": given.mask_type == "soft"}


def _value_bytes(config: PeftConfig, _: Mapping[str, Any]) -> Mapping[str, Any]:
    given: Any = config
    return {"value_bytes": 4 if given.storage_dtype in (None, "float32") else 2}


FFN_ADAPTER: dict[str, Any] = {
    **WEIGHT_CHANGE,
    "parameters_adapted": ParametersAdapted.ADDITION,
    "insertion_form": InsertionForm.SEQUENTIAL,
    "workspace": frozenset({Workspace.FFN_OUTPUT}),
    "merges": False,
    "mixes": True,
}
MERGES = 'with the default activation; with activation="identity" it is a linear map and merges exactly'

BOTTLENECK_TRAINED = per_site(b * (parallel * d_in + (1 - parallel) * d_out + d_out) + use_bias * (b + d_out))
add_card(
    "BOTTLENECK_ADAPTER",
    "Bottleneck adapter",
    "arXiv 1902.00751, placed as in arXiv 2005.00247",
    FFN_ADAPTER,
    trained=BOTTLENECK_TRAINED,
    stored=in_float32(BOTTLENECK_TRAINED),
    symbols=_form,
    reasons={
        "merges": MERGES,
        "insertion_form": 'by default; insertion_form="parallel" reads the host\'s input',
        "integration_form": "its scale is one by default",
    },
)

add_card(
    "XPEFT",
    "X-PEFT",
    "arXiv 2401.16137",
    FFN_ADAPTER,
    inter_connectivity=InterConnectivity.DYNAMIC,
    parameter_sharing=ParameterSharing.SHARED,
    integration_form=IntegrationForm.GATED_ADDITION,
    trained=per_site(P * (2 * N + learn_gain)),
    stored=per_site(P * (2 * (soft * (2 * N) + (1 - soft) * ceil(N / 8)) + 2 * learn_gain)),
    symbols=_kind_of_mask,
    reasons={
        "merges": MERGES,
        "inter_connectivity": "training chooses which adapters of the pool take effect",
        "parameter_sharing": "all profiles use one frozen pool, each through masks of its own",
        "integration_form": "a trained gain for each site; with learn_gain=False a constant, which is scaled addition",
        "insertion_form": 'by default; insertion_form="parallel" reads the host\'s input',
        "stored": "masks as bits (hard) or two bytes a weight (soft), gains as two bytes; the pool is not in the file",
        "mixes": "by adapter_names, and rows of one adapter by profile names",
    },
    unchecked={
        **INTER_UNCHECKED,
        "integration_form": "the trained number is the gain's distance from where it starts",
        "parameter_sharing": "the shared pool is frozen and not in the profile's file",
    },
)

NUMBERS = nearest(density * (d_in * d_out)) + (include_bias * bias) * nearest(density * d_out)
add_card(
    "MAGNITUDE_MASK",
    "Magnitude mask (PaFi)",
    "arXiv 2305.16742",
    WEIGHT_CHANGE,
    intra_connectivity=IntraConnectivity.SPARSE,
    inter_connectivity=InterConnectivity.FIXED_SPARSE,
    input_type=InputType.WEIGHTS,
    insertion_form=InsertionForm.IN_PLACE,
    workspace=ALL_LINEAR,
    trained=per_site(NUMBERS),
    stored=per_site(value_bytes * NUMBERS),
    symbols=_value_bytes,
    mixes=True,
    reasons={
        "input_type": "which numbers are trained is read from the base's weights, and they are numbers of it",
        "stored": "values only: the places follow from the base",
        "trained": 'with scope="module", the default; each weight and bias has its own count',
    },
)


def _what_it_reads(config: PeftConfig, _: Mapping[str, Any]) -> Mapping[str, Any]:
    given: Any = config
    return {
        "on_bias": given.target in ("bias", "both"),
        "on_weight": given.target in ("weight", "both"),
        "inner_bias": given.adapter_bias is True,
        **_value_bytes(config, _),
    }


on_bias, on_weight, inner_bias = symbols("on_bias on_weight inner_bias")
add_card(
    "WEIGHT_ADAPTER",
    "Weight adapter (HiWi)",
    "arXiv 2305.16742",
    WEIGHT_CHANGE,
    input_type=InputType.WEIGHTS,
    insertion_form=InsertionForm.IN_PLACE,
    workspace=frozenset({Workspace.FFN_INTERMEDIATE, Workspace.FFN_OUTPUT}),
    trained=per_site(on_weight * (2 * r * d_in + inner_bias * r) + on_bias * (bias * (2 * r * d_out + inner_bias * r))),
    stored=per_site(value_bytes * (on_weight * (d_in * d_out) + on_bias * (bias * d_out))),
    mixes=True,
    symbols=_what_it_reads,
    needs='hosts with a bias, or target="weight"',
    reasons={
        "intra_connectivity": "of the adapter over a weight or bias; the change of a bias is one fixed vector",
        "insertion_form": "what it makes is a number for each number of the host, and stands in its place",
        "integration_form": "its scale is one by default",
        "trained": "with adapter_bias=None, the default, r more for a bias or weight that is all zero",
        "stored": "what the adapter makes, not the adapter: r does not enter",
    },
)
