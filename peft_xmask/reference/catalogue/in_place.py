"""Methods that train numbers of the base, or stand-ins for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftConfig

from ..card import add_card, in_float32
from ..formula import floor, once, per_site, symbols
from ..vocabulary import (
    InputType,
    InsertionForm,
    Insertions,
    IntegrationForm,
    InterConnectivity,
    IntraConnectivity,
    Workspace,
)
from .kinds import WEIGHT_CHANGE, d_in, d_out, numbers, r

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
    trained=per_site(numbers),
    stored=in_float32(per_site(numbers)),
    adds_up=False,
    reasons={
        "intra_connectivity": "a norm's weight scales each feature on its own",
        "workspace": "the norms of each block and the one behind the last; on BERT PEFT has no default",
    },
)

SHIRA_TRAINED = per_site(r * (d_in + d_out))
add_card(
    "SHIRA",
    "SHiRA",
    "arXiv 2406.13175",
    IN_PLACE,
    trained=SHIRA_TRAINED,
    stored=per_site(12 * r * (d_in + d_out)),
    reasons={"stored": "four bytes for a value, eight for its place"},
)

chosen = floor(d_in * d_out * (1 - sparsity))
add_card(
    "SUPERTUNING",
    "Supertuning",
    "arXiv 2607.09287",
    IN_PLACE,
    trained=per_site(chosen),
    stored=per_site(4 * chosen + save_indices * (4 * chosen)),
    reasons={"trained": "with r=None, the default: no LoRA beside it; at least one number"},
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
    trained=once(tokens * d),
    stored=in_float32(per_site(tokens * d * names)),
    symbols=_token_count,
    needs="token_indices",
    mixes=True,
    adds_up=False,
    reasons={
        "adds_up": "PEFT refuses two active adapters that replace the same tokens",
        "input_type": "the rows are embeddings of tokens",
        "stored": "rows that the model ties are written under each of their names",
        "intra_connectivity": "a row takes effect where its token stands, and nowhere else",
    },
)
