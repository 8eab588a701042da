"""The methods of this package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftConfig
from sympy import ceiling

from ..card import add_card, in_float32
from ..formula import nearest, per_site, symbols
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
    "supports_mixed_batch": True,
}
MERGES = 'with the default activation; with activation="identity" the adapter is linear and merges exactly'

BOTTLENECK_TRAINED = per_site(b * (parallel * d_in + (1 - parallel) * d_out + d_out) + use_bias * (b + d_out))
add_card(
    "BOTTLENECK_ADAPTER",
    "Bottleneck adapter",
    "arXiv 1902.00751, placed as in arXiv 2005.00247",
    FFN_ADAPTER,
    trainable=BOTTLENECK_TRAINED,
    stored=in_float32(BOTTLENECK_TRAINED),
    symbols=_form,
    reasons={
        "merges": MERGES,
        "insertion_form": 'by default; insertion_form="parallel" reads the host\'s input',
        "integration_form": "its default scale is one",
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
    trainable=per_site(P * (2 * N + learn_gain)),
    stored=per_site(P * (2 * (soft * (2 * N) + (1 - soft) * ceiling(N / 8)) + 2 * learn_gain)),
    symbols=_kind_of_mask,
    reasons={
        "merges": MERGES,
        "inter_connectivity": "training selects which adapters of the pool take effect",
        "parameter_sharing": "all profiles use one frozen pool, each through its own masks",
        "integration_form": "a trained gain per site; with learn_gain=False a constant, which is scaled addition",
        "insertion_form": 'by default; insertion_form="parallel" reads the host\'s input',
        "stored": "masks as bits (hard) or two bytes per weight (soft), and two bytes per gain; the pool is separate",
        "supports_mixed_batch": "adapters through adapter_names, and profiles of one adapter by name",
    },
    unchecked={
        **INTER_UNCHECKED,
        "integration_form": "the trainable parameter is the gain's offset from its initial value",
        "parameter_sharing": "the shared pool is frozen and is not in the profile's file",
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
    trainable=per_site(NUMBERS),
    stored=per_site(value_bytes * NUMBERS),
    symbols=_value_bytes,
    supports_mixed_batch=True,
    reasons={
        "input_type": "the base's weights determine which of them are trained",
        "stored": "values only; the base determines their indices",
        "trainable": 'with scope="module", the default, each weight and bias has its own count',
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
    trainable=per_site(
        on_weight * (2 * r * d_in + inner_bias * r) + on_bias * (bias * (2 * r * d_out + inner_bias * r))
    ),
    stored=per_site(value_bytes * (on_weight * (d_in * d_out) + on_bias * (bias * d_out))),
    supports_mixed_batch=True,
    symbols=_what_it_reads,
    needs='hosts with a bias, or target="weight"',
    reasons={
        "intra_connectivity": "describes the adapter over a weight or bias; the change of a bias is one fixed vector",
        "insertion_form": "it computes a replacement for the host's weight or bias",
        "integration_form": "its default scale is one",
        "trainable": "with adapter_bias=None, the default, plus r for a weight or bias that is all zero",
        "stored": "the resulting change, not the adapter, so r does not matter",
    },
)
