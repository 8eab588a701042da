"""What many cards have in common."""

from __future__ import annotations

from typing import Any

from ..formula import symbols
from ..vocabulary import (
    InputType,
    InsertionForm,
    Insertions,
    IntegrationForm,
    InterConnectivity,
    IntraConnectivity,
    ParametersAdapted,
    ParameterSharing,
    Workspace,
)

d_in, d_out, bias, numbers = symbols("d_in d_out bias numbers")
d_in_max, d_out_max = symbols("d_in_max d_out_max")
(r,) = symbols("r")

QUERY_AND_VALUE = frozenset({Workspace.ATTENTION_QUERY, Workspace.ATTENTION_VALUE})
ALL_LINEAR = frozenset(
    {
        Workspace.ATTENTION_QUERY,
        Workspace.ATTENTION_KEY,
        Workspace.ATTENTION_VALUE,
        Workspace.ATTENTION_OUTPUT,
        Workspace.FFN_INTERMEDIATE,
        Workspace.FFN_OUTPUT,
    }
)

INTER_UNCHECKED = {"inter_connectivity": "read from the code: what training and inputs may choose, no single run shows"}

WEIGHT_CHANGE: dict[str, Any] = {
    "intra_connectivity": IntraConnectivity.DENSE,
    "inter_connectivity": InterConnectivity.FIXED_DENSE,
    "parameters_adapted": ParametersAdapted.REPARAMETERISATION,
    "parameter_sharing": ParameterSharing.NONE,
    "input_type": InputType.HIDDEN,
    "insertion_form": InsertionForm.PARALLEL,
    "insertions": Insertions.ALL_LAYERS,
    "integration_form": IntegrationForm.DIRECT_ADDITION,
    "workspace": QUERY_AND_VALUE,
    "unchecked": INTER_UNCHECKED,
}
"""A change of the host's weight, computed beside the host: the LoRA family."""

SCALED: dict[str, Any] = {**WEIGHT_CHANGE, "integration_form": IntegrationForm.SCALED_ADDITION}
"""The same, times a constant of the config."""

ORTHOGONAL: dict[str, Any] = {
    **WEIGHT_CHANGE,
    "insertion_form": InsertionForm.SEQUENTIAL,
    "integration_form": IntegrationForm.COMPOSITION,
}
"""The host's input or output is multiplied by a trained matrix."""

PROMPT: dict[str, Any] = {
    "intra_connectivity": IntraConnectivity.DENSE,
    "inter_connectivity": InterConnectivity.DYNAMIC,
    "parameters_adapted": ParametersAdapted.ADDITION,
    "parameter_sharing": ParameterSharing.NONE,
    "input_type": InputType.DATA,
    "insertion_form": InsertionForm.PARALLEL,
    "insertions": Insertions.ONE,
    "integration_form": IntegrationForm.CONCATENATION,
    "workspace": frozenset({Workspace.EMBEDDING}),
    "merges": False,
    "adds_up": False,
}
"""Vectors that stand before the sequence."""

PROMPT_REASONS = {
    "intra_connectivity": "every number of a virtual token takes part in every product of attention with it",
    "inter_connectivity": "how much each position takes from a virtual token is attention's choice, by the input",
    "insertion_form": "virtual tokens stand beside the real ones; no module's output is handed through them",
    "input_type": "the trained numbers are embeddings, of tokens that are not in the vocabulary",
}
PROMPT_UNCHECKED = {
    "intra_connectivity": "there is no map from inputs to outputs inside a module of vectors",
    "inter_connectivity": INTER_UNCHECKED["inter_connectivity"],
    "input_type": "a definition",
    "insertion_form": "a definition",
    "parameter_sharing": "there is one site",
}
