"""Methods that train parameters of the base, or replacements for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftConfig
from sympy import floor

from ..card import add_card, in_float32
from ..formula import once, per_site, symbols
from ..vocabulary import (
    InputType,
    InsertionForm,
    Insertions,
    IntegrationForm,
    InterConnectivity,
    IntraConnectivity,
    Workspace,
)
from .kinds import WEIGHT_CHANGE, d_in, d_out, parameters, r

sparsity, save_indices, tokens, names, d = symbols("sparsity save_precomputed_indices tokens names d")

IN_PLACE: dict[str, Any] = {
    **WEIGHT_CHANGE,
    "intra_connectivity": IntraConnectivity.SPARSE,
    "inter_connectivity": InterConnectivity.FIXED_SPARSE,
    "input_type": InputType.WEIGHTS,
    "insertion_form": InsertionForm.IN_PLACE,
}

add_card(
    "LN_TUNING",
    "LN tuning",
    "arXiv 2312.11420",
    IN_PLACE,
    inter_connectivity=InterConnectivity.FIXED_DENSE,
    integration_form=IntegrationForm.REPLACEMENT,
    workspace=frozenset({Workspace.NORMALISATION}),
    trainable=per_site(parameters),
    stored=in_float32(per_site(parameters)),
    adds_up=False,
    reasons={
        "intra_connectivity": "a norm's weight scales each feature separately",
        "workspace": "the norms of each block and the final norm; PEFT has no default for BERT",
    },
)

SHIRA_TRAINED = per_site(r * (d_in + d_out))
add_card(
    "SHIRA",
    "SHiRA",
    "arXiv 2406.13175",
    IN_PLACE,
    trainable=SHIRA_TRAINED,
    stored=per_site(12 * r * (d_in + d_out)),
    reasons={"stored": "four bytes per value and eight per index"},
)

chosen = floor(d_in * d_out * (1 - sparsity))
add_card(
    "SUPERTUNING",
    "Supertuning",
    "arXiv 2607.09287",
    IN_PLACE,
    trainable=per_site(chosen),
    stored=per_site(4 * chosen + save_indices * (4 * chosen)),
    reasons={"trainable": "with r=None, the default: no LoRA beside it; at least one value"},
)


def _token_count(config: PeftConfig, _: Mapping[str, Any]) -> Mapping[str, Any]:
    given: Any = config
    return {"tokens": len(given.token_indices)}


add_card(
    "TRAINABLE_TOKENS",
    "Trainable tokens",
    "PEFT pull request 1541",
    IN_PLACE,
    input_type=InputType.DATA,
    insertions=Insertions.ONE,
    integration_form=IntegrationForm.REPLACEMENT,
    workspace=frozenset({Workspace.EMBEDDING}),
    trainable=once(tokens * d),
    stored=in_float32(per_site(tokens * d * names)),
    symbols=_token_count,
    needs="token_indices",
    supports_mixed_batch=True,
    adds_up=False,
    reasons={
        "adds_up": "PEFT rejects two active adapters that replace the same tokens",
        "input_type": "the rows are embeddings of tokens",
        "stored": "the file holds rows of tied weights once per name",
        "intra_connectivity": "a row takes effect only at the positions of its token",
    },
)
