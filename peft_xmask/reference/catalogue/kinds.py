"""Symbols and values that many cards share."""

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

d_in, d_out, bias, parameters = symbols("d_in d_out bias parameters")
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

INTER_UNCHECKED = {
    "inter_connectivity": "read from the code; a single run cannot show what training and inputs may choose"
}

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
"""A change of the host's weight, computed beside the host, as in LoRA."""

SCALED: dict[str, Any] = {**WEIGHT_CHANGE, "integration_form": IntegrationForm.SCALED_ADDITION}
"""The same, multiplied by a constant from the config."""

ORTHOGONAL: dict[str, Any] = {
    **WEIGHT_CHANGE,
    "insertion_form": InsertionForm.SEQUENTIAL,
    "integration_form": IntegrationForm.COMPOSITION,
}
"""A trained matrix multiplies the host's input or output."""

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
"""Vectors placed before the sequence."""

PROMPT_REASONS = {
    "intra_connectivity": "every element of a virtual token takes part in each attention product with it",
    "inter_connectivity": "attention decides from the input how much each position takes from a virtual token",
    "insertion_form": "virtual tokens stand beside the real ones; no module's output passes through them",
    "input_type": "its parameters are embeddings of tokens outside the vocabulary",
}
PROMPT_UNCHECKED = {
    "intra_connectivity": "a module of vectors has no map from inputs to outputs",
    "inter_connectivity": INTER_UNCHECKED["inter_connectivity"],
    "input_type": "a definition",
    "insertion_form": "a definition",
    "parameter_sharing": "there is one site",
}
