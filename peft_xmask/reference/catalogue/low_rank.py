"""Low-rank and other dense changes of a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftConfig
from sympy import Min, floor
from sympy.utilities.lambdify import implemented_function

from ..card import add_card, in_float32
from ..formula import per_site, symbols
from ..vocabulary import InputType, IntegrationForm, InterConnectivity
from .kinds import ALL_LINEAR, INTER_UNCHECKED, SCALED, WEIGHT_CHANGE, bias, d_in, d_out, r

use_dora, lora_bias, init_r, hybrid_r, para, depth = symbols("use_dora lora_bias init_r hybrid_r para depth")
num_subspaces, subspace_rank, block_size = symbols("num_subspaces subspace_rank block_size")
fixed_rank, by_half = symbols("fixed_rank by_half")
A_B_lora, A_B_vector, A_B_constant = symbols("A_B_lora A_B_vector A_B_constant")
C_lora, C_vector, C_none = symbols("C_lora C_vector C_none")
D_E_vector, D_E_constant, D_E_none = symbols("D_E_vector D_E_constant D_E_none")

PAIR = r * (d_in + d_out)


def _split(width: float) -> tuple[int, int]:
    """The two factors of a width that are closest to each other, the smaller first."""
    small = max(low for low in range(1, int(width**0.5) + 1) if width % low == 0)
    return small, int(width) // small


def _kronecker(rank: float, width_in: float, width_out: float) -> float:
    """Parameters of LoKr's factors: ``w1`` is a full matrix, ``w2`` is full or low-rank."""
    (out_small, out_large), (in_small, in_large) = _split(width_out), _split(width_in)
    second = out_large * in_large if rank >= max(out_large, in_large) / 2 else rank * (out_large + in_large)
    return out_small * in_small + second


kronecker = implemented_function("kronecker", _kronecker)


def _glora_paths(config: PeftConfig, _: Mapping[str, Any]) -> Mapping[str, Any]:
    chosen: Any = config
    return {
        **{f"A_B_{kind}": chosen.config_A_B == kind for kind in ("lora", "vector", "constant")},
        **{f"C_{kind}": chosen.config_C == kind for kind in ("lora", "vector", "none")},
        **{f"D_E_{kind}": chosen.config_D_E == kind for kind in ("vector", "constant", "none")},
    }


def _osf_rank(config: PeftConfig, _: Mapping[str, Any]) -> Mapping[str, Any]:
    chosen: Any = config
    return {"fixed_rank": chosen.effective_rank or 0, "by_half": not chosen.effective_rank}


LORA_TRAINED = per_site(PAIR + use_dora * d_out + lora_bias * d_out)
add_card(
    "LORA",
    "LoRA",
    "arXiv 2106.09685",
    SCALED,
    trainable=LORA_TRAINED,
    stored=in_float32(LORA_TRAINED),
    supports_mixed_batch=True,
    scale="lora_alpha",
)

ADALORA_TRAINED = per_site(init_r * (d_in + d_out + 1))
add_card(
    "ADALORA",
    "AdaLoRA",
    "arXiv 2303.10512",
    SCALED,
    inter_connectivity=InterConnectivity.DYNAMIC,
    trainable=ADALORA_TRAINED,
    stored=in_float32(ADALORA_TRAINED),
    scale="lora_alpha",
    needs="total_step",
    reasons={
        "inter_connectivity": "training moves ranks between sites by importance",
        "trainable": "before AdaLoRA prunes ranks",
        "several": "PEFT can hold several for inference but trains only one",
    },
)

ADAMSS_TRAINED = per_site(subspace_rank * (num_subspaces * Min(r, d_in, d_out) + d_out))
add_card(
    "ADAMSS",
    "AdaMSS",
    "openreview 8ZdWmpYxT0",
    WEIGHT_CHANGE,
    trainable=ADAMSS_TRAINED,
    stored=in_float32(per_site(ADAMSS_TRAINED.site + d_in * d_out + bias * d_out)),
    reasons={
        "trainable": "exact if each subspace, a cluster of rows, has at least subspace_rank rows",
        "stored": "the file also holds the frozen part of the weight and the bias",
    },
)

C3A_TRAINED = per_site(d_in * d_out / block_size)
add_card(
    "C3A",
    "C3A",
    "arXiv 2407.19342",
    WEIGHT_CHANGE,
    trainable=C3A_TRAINED,
    stored=in_float32(C3A_TRAINED),
    needs="block_size that divides every width",
    adds_up=False,
    reasons={
        "adds_up": "in PEFT 0.21.2 the second adapter reads the first one's output instead of the host's input",
    },
)

DEFT_TRAINED = per_site(r * d_out + (1 - para) * (r * d_in))
add_card(
    "DEFT",
    "DEFT",
    "Kumar et al., NeurIPS 2025",
    WEIGHT_CHANGE,
    input_type=InputType.WEIGHTS,
    trainable=DEFT_TRAINED,
    stored=in_float32(DEFT_TRAINED),
    reasons={
        "input_type": "it removes a subspace from the base's output and adds a low-rank map there",
        "insertion_form": "the map reads the host's input; the removed part is computed from its output",
    },
)

DELORA_TRAINED = per_site(PAIR + 1)
add_card(
    "DELORA",
    "DeLoRA",
    "arXiv 2503.18225",
    WEIGHT_CHANGE,
    integration_form=IntegrationForm.GATED_ADDITION,
    trainable=DELORA_TRAINED,
    stored=in_float32(per_site(PAIR + 1 + d_in)),
    gate="delora_lambda",
    reasons={"stored": "the file also holds the norms of the base weight's columns"},
)

GLORA_TRAINED = per_site(
    A_B_lora * (2 * PAIR)
    + A_B_vector * (2 * d_out)
    + A_B_constant * 2
    + bias * (C_lora * (r * (d_in + 1)) + C_vector * d_in + D_E_vector * (2 * d_out) + D_E_constant * 2)
)
add_card(
    "GLORA",
    "GLoRA",
    "arXiv 2306.07967",
    WEIGHT_CHANGE,
    input_type=InputType.WEIGHTS,
    trainable=GLORA_TRAINED,
    stored=in_float32(
        per_site(GLORA_TRAINED.site + (1 - bias) * (d_in + 2 * d_out) + bias * (C_none * d_in + D_E_none * (2 * d_out)))
    ),
    supports_mixed_batch=True,
    symbols=_glora_paths,
    reasons={
        "input_type": "W0*A and W0 @ C are products with the base's weights",
        "stored": "where C, D or E is none, or the host has no bias, the file holds zeros instead",
    },
)

GRALORA_TRAINED = per_site((r + hybrid_r) * (d_in + d_out))
add_card(
    "GRALORA",
    "GraLoRA",
    "arXiv 2505.20355",
    SCALED,
    trainable=GRALORA_TRAINED,
    stored=in_float32(GRALORA_TRAINED),
    scale="alpha",
)

HIRA_TRAINED = per_site(PAIR)
add_card(
    "HIRA",
    "HiRA",
    "openreview TwJrTz9cRS",
    WEIGHT_CHANGE,
    input_type=InputType.WEIGHTS,
    trainable=HIRA_TRAINED,
    stored=in_float32(HIRA_TRAINED),
    reasons={
        "input_type": "the change is the elementwise product of the base's weight and a low-rank matrix",
    },
)

LOHA_TRAINED = per_site(2 * PAIR)
add_card(
    "LOHA",
    "LoHa",
    "arXiv 2108.06098",
    SCALED,
    trainable=LOHA_TRAINED,
    stored=in_float32(LOHA_TRAINED),
    scale="alpha",
)

LOKR_TRAINED = per_site(kronecker(r, d_in, d_out))
add_card(
    "LOKR",
    "LoKr",
    "arXiv 2309.14859",
    SCALED,
    trainable=LOKR_TRAINED,
    stored=in_float32(LOKR_TRAINED),
    scale="alpha",
    reasons={
        "trainable": "kronecker(r, d_in, d_out) = a*c + b*e, or a*c + r*(b + e) if r < max(b, e)/2, where d_out = a*b, "
        "d_in = c*e as close to squares as possible; with the default decompose_both and decompose_factor",
        "integration_form": "the constant is alpha/r if a factor is low-rank, else one",
    },
    unchecked={
        **INTER_UNCHECKED,
        "integration_form": "at tiny widths both factors are full matrices, for which PEFT has no constant",
    },
)

MISS_TRAINED = per_site(r * d_out)
add_card(
    "MISS",
    "MiSS",
    "arXiv 2409.15371",
    WEIGHT_CHANGE,
    trainable=MISS_TRAINED,
    stored=in_float32(MISS_TRAINED),
    reasons={"trainable": "with init_weights=True; 'bat' and 'mini' differ"},
)

rank_kept = fixed_rank + by_half * floor(Min(d_in, d_out) / 2)
OSF_TRAINED = per_site((d_in + d_out + 1) * (Min(d_in, d_out) - rank_kept))
add_card(
    "OSF",
    "OSF",
    "arXiv 2504.07097",
    WEIGHT_CHANGE,
    workspace=ALL_LINEAR,
    trainable=OSF_TRAINED,
    stored=in_float32(OSF_TRAINED),
    symbols=_osf_rank,
    adds_up=False,
    reasons={
        "adds_up": "only the first of several active adapters takes effect",
        "trainable": "fixed_rank = effective_rank; if unset, half of the smaller width (by_half)",
    },
)

PEANUT_TRAINED = per_site(2 * r * d_out + 2 * depth * (r * r))
add_card(
    "PEANUT",
    "PEANuT",
    "arXiv 2410.01870",
    SCALED,
    input_type=InputType.WEIGHTS,
    trainable=PEANUT_TRAINED,
    stored=in_float32(PEANUT_TRAINED),
    scale="scaling",
    reasons={"input_type": "a small network computes the change from the base's weight"},
)

PSOFT_TRAINED = per_site(r * (r - 1) / 2 + 2 * r)
add_card(
    "PSOFT",
    "PSOFT",
    "arXiv 2505.11235",
    WEIGHT_CHANGE,
    trainable=PSOFT_TRAINED,
    stored=in_float32(PSOFT_TRAINED),
    reasons={
        "trainable": "with the default psoft_orth, psoft_mag_a and psoft_mag_b",
        "integration_form": "a rotation inside the base's main subspace; the resulting change is added",
    },
)
