"""Virtual tokens and prefixes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftConfig

from ..card import add_card, in_float32
from ..formula import once, per_site, symbols
from ..vocabulary import Insertions, IntegrationForm, ParameterSharing, Workspace
from .kinds import PROMPT, PROMPT_REASONS, PROMPT_UNCHECKED

n, token_dim, layers, parts = symbols("num_virtual_tokens token_dim num_layers num_transformer_submodules")
h, tasks, ranks = symbols("encoder_hidden_size num_tasks num_ranks")
frozen, adapter_len, d, prompt_tokens = symbols("num_frozen_tokens adapter_len d prompt_tokens")

PREFIX: dict[str, Any] = {
    **PROMPT,
    "insertions": Insertions.ALL_LAYERS,
    "workspace": frozenset({Workspace.ATTENTION_KEY, Workspace.ATTENTION_VALUE}),
}
TOKENS = parts * n * token_dim
KEYS_AND_VALUES = 2 * layers * n * token_dim

add_card(
    "PROMPT_TUNING",
    "Prompt tuning",
    "arXiv 2104.08691",
    PROMPT,
    trainable=once(TOKENS),
    stored=in_float32(once(TOKENS)),
    needs="num_virtual_tokens",
    reasons=PROMPT_REASONS,
    unchecked=PROMPT_UNCHECKED,
)

add_card(
    "P_TUNING",
    "P-tuning",
    "arXiv 2103.10385",
    PROMPT,
    trainable=once(TOKENS + token_dim * h + h + h * h + h + h * token_dim + token_dim),
    stored=in_float32(once(TOKENS)),
    needs="num_virtual_tokens, encoder_hidden_size",
    reasons={
        **PROMPT_REASONS,
        "trainable": "with the MLP encoder, the default",
        "stored": "the encoder's outputs are saved; the encoder is discarded",
    },
    unchecked=PROMPT_UNCHECKED,
)

MULTITASK = once(TOKENS + tasks * ranks * (parts * n + token_dim))
add_card(
    "MULTITASK_PROMPT_TUNING",
    "Multitask prompt tuning",
    "arXiv 2303.02861",
    PROMPT,
    parameter_sharing=ParameterSharing.SHARED,
    trainable=MULTITASK,
    stored=in_float32(MULTITASK),
    needs="num_virtual_tokens",
    reasons={
        **PROMPT_REASONS,
        "parameter_sharing": "tasks share one prompt, and each has its own low-rank factor",
        "supports_mixed_batch": "not through adapter_names; task_ids mixes tasks of one adapter in a batch",
    },
    unchecked=PROMPT_UNCHECKED,
)


def _prompt_tokens(config: PeftConfig, _: Mapping[str, Any]) -> Mapping[str, Any]:
    given: Any = config
    return {"prompt_tokens": len(given.cpt_token_ids)}


add_card(
    "CPT",
    "Context-aware prompt tuning",
    "arXiv 2410.17222",
    PROMPT,
    trainable=once(prompt_tokens * token_dim),
    stored=in_float32(once(prompt_tokens * token_dim)),
    symbols=_prompt_tokens,
    needs="cpt_token_ids, cpt_mask, cpt_tokens_type_mask; task_type CAUSAL_LM",
    reasons={**PROMPT_REASONS, "input_type": "changes of the embeddings of the context's own tokens"},
    unchecked=PROMPT_UNCHECKED,
)

add_card(
    "PREFIX_TUNING",
    "Prefix tuning",
    "arXiv 2101.00190",
    PREFIX,
    trainable=once(KEYS_AND_VALUES),
    stored=in_float32(once(KEYS_AND_VALUES)),
    needs="num_virtual_tokens",
    reasons={
        **PROMPT_REASONS,
        "trainable": "with prefix_projection=False, the default",
        "input_type": "its parameters are keys and values of tokens outside the vocabulary",
    },
    unchecked=PROMPT_UNCHECKED,
)

add_card(
    "CARTRIDGE",
    "Cartridges",
    "arXiv 2506.06266",
    PREFIX,
    trainable=once(2 * layers * (n - frozen) * token_dim),
    stored=in_float32(once(KEYS_AND_VALUES)),
    needs="num_virtual_tokens",
    reasons={
        **PROMPT_REASONS,
        "stored": "the file also holds the frozen first tokens",
        "input_type": "its parameters are keys and values, usually initialised from a text's first tokens",
    },
    unchecked=PROMPT_UNCHECKED,
)

ADAPTION = per_site(adapter_len * d + 1)
add_card(
    "ADAPTION_PROMPT",
    "LLaMA-Adapter",
    "arXiv 2303.16199",
    PROMPT,
    insertions=Insertions.SOME_LAYERS,
    integration_form=IntegrationForm.GATED_ADDITION,
    workspace=frozenset({Workspace.ATTENTION}),
    trainable=ADAPTION,
    stored=in_float32(ADAPTION),
    gate="adaption_gate",
    needs="adapter_len, adapter_layers",
    reasons={
        **PROMPT_REASONS,
        "workspace": "attention over the prompts is computed separately and joins attention's result",
        "insertion_form": "beside attention: it reads the same hidden states, and is added to attention's output",
    },
    unchecked={name: why for name, why in PROMPT_UNCHECKED.items() if name != "parameter_sharing"},
)
