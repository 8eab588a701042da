"""Changes of a weight expressed in frozen, random or shared bases, so that few parameters are trained."""

from __future__ import annotations

from sympy import Min, ceiling, floor

from ..card import add_card, in_float32
from ..formula import once, per_site, symbols
from ..vocabulary import InputType, InsertionForm, IntegrationForm, InterConnectivity, ParameterSharing
from .kinds import INTER_UNCHECKED, SCALED, WEIGHT_CHANGE, d_in, d_in_max, d_out, d_out_max, r

n_frequency, sparse_rate, u, theta_d_length = symbols("n_frequency sparse_rate u theta_d_length")
num_vectors, vector_length, save_projection = symbols("num_vectors vector_length save_projection")
d_min_max, d_max_max = symbols("d_min_max d_max_max")

VERA_TRAINED = per_site(r + d_out)
VERA_STORED = per_site(r + d_out, once=save_projection * (r * (d_in_max + d_out_max)))
add_card(
    "VERA",
    "VeRA",
    "arXiv 2310.11454",
    WEIGHT_CHANGE,
    parameter_sharing=ParameterSharing.SHARED,
    trainable=VERA_TRAINED,
    stored=in_float32(VERA_STORED),
)

PVERA_TRAINED = per_site(2 * r + d_out)
PVERA_STORED = per_site(2 * r + d_out, once=save_projection * (r * (2 * d_in_max + d_out_max)))
add_card(
    "PVERA",
    "PVeRA",
    "arXiv 2512.07703",
    WEIGHT_CHANGE,
    parameter_sharing=ParameterSharing.SHARED,
    trainable=PVERA_TRAINED,
    stored=in_float32(PVERA_STORED),
    reasons={"merges": "with sample_at_inference=False, the default, the mean is merged"},
)

n_bases = ceiling(Min(d_in, d_out) / r)
RANDLORA_TRAINED = per_site(n_bases * (r + Min(d_in, d_out)))
_PROJECTIONS = r * d_min_max + d_max_max * ceiling(d_min_max / r) * r
add_card(
    "RANDLORA",
    "RandLoRA",
    "arXiv 2502.00987",
    SCALED,
    parameter_sharing=ParameterSharing.SHARED,
    trainable=RANDLORA_TRAINED,
    stored=in_float32(
        per_site(RANDLORA_TRAINED.site + save_projection * _PROJECTIONS, once=save_projection * _PROJECTIONS)
    ),
    scale="randlora_alpha",
    reasons={"stored": "the file holds the shared random bases once for the model and again for every site"},
)

add_card(
    "TINYLORA",
    "TinyLoRA",
    "arXiv 2602.04118",
    WEIGHT_CHANGE,
    trainable=per_site(u),
    stored=in_float32(per_site(u + r * (d_in + d_out) + save_projection * (u * (r * r)))),
    reasons={
        "parameter_sharing": "with weight_tying=0, the default; with 1 all sites are tied",
        "trainable": "with weight_tying=0",
    },
)

add_card(
    "UNILORA",
    "Uni-LoRA",
    "arXiv 2506.00799",
    WEIGHT_CHANGE,
    parameter_sharing=ParameterSharing.TIED,
    trainable=once(theta_d_length),
    stored=in_float32(once(theta_d_length)),
    reasons={"stored": "with save_indices=False; the indices follow from the seed"},
)

VBLORA_TRAINED = per_site(
    num_vectors * r * (d_in / vector_length + d_out / vector_length), once=num_vectors * vector_length
)
add_card(
    "VBLORA",
    "VB-LoRA",
    "arXiv 2405.15179",
    WEIGHT_CHANGE,
    parameter_sharing=ParameterSharing.SHARED,
    inter_connectivity=InterConnectivity.DYNAMIC,
    trainable=VBLORA_TRAINED,
    stored=in_float32(VBLORA_TRAINED),
    needs="vector_length that divides every width",
    reasons={
        "inter_connectivity": "training chooses which vectors of the bank form each row",
        "stored": "with save_only_topk_weights=False",
    },
)

add_card(
    "FOURIERFT",
    "FourierFT",
    "arXiv 2405.03003",
    SCALED,
    trainable=per_site(n_frequency),
    stored=in_float32(per_site(n_frequency)),
    scale="scaling",
)
add_card(
    "WAVEFT",
    "WaveFT",
    "arXiv 2505.12532",
    SCALED,
    trainable=per_site(n_frequency),
    stored=in_float32(per_site(n_frequency)),
    scale="scaling",
    reasons={"intra_connectivity": "a coefficient reaches the rows and columns its wavelet covers, up to all of them"},
    unchecked={**INTER_UNCHECKED, "intra_connectivity": "depends on which coefficients are drawn, and on their number"},
)

n_offdiagonal = floor(sparse_rate * d_in * d_in)
add_card(
    "FROD",
    "FRoD",
    "doi 10.1609/aaai.v40i31.39813",
    WEIGHT_CHANGE,
    parameter_sharing=ParameterSharing.SHARED,
    input_type=InputType.WEIGHTS,
    insertion_form=InsertionForm.IN_PLACE,
    integration_form=IntegrationForm.REPLACEMENT,
    trainable=per_site(d_in + n_offdiagonal),
    stored=per_site(4 * (d_in + n_offdiagonal), group=save_projection * (4 * (d_in * d_in) + 16 * n_offdiagonal + 16)),
    group_of=lambda name: ".".join(part for part in name.split(".")[-2:] if not part.isdigit()),
    reasons={
        "input_type": "the frozen bases are a joint decomposition of all base weights of one kind",
        "insertion_form": "the decomposed weight replaces the base's",
    },
)
