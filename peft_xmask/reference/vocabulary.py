"""PEFT-Ref's vocabulary: the properties that distinguish methods, and the rule for each value.

The properties are those of Sabry & Belz (arXiv 2304.12410). The rules are ours. Each states what must be true of a
method's code, so most can be checked by running it. Values marked "ours" are not in the paper's lists.
"""

from __future__ import annotations

from enum import Enum
from typing import Any


class Word(str, Enum):
    """A value of a property. ``rule`` says when it applies."""

    rule: str

    def __new__(cls, value: str, rule: str) -> Any:
        """A string with a rule."""
        word = str.__new__(cls, value)
        word._value_ = value
        word.rule = rule
        return word

    def __str__(self) -> str:
        return str(self.value)


class IntraConnectivity(Word):
    """How the parameters inside a module are connected."""

    DENSE = "dense", "most of the module's inputs reach most of its outputs"
    SPARSE = "sparse", "each output of the module depends on at most half of its inputs"


class InterConnectivity(Word):
    """How a module is connected to the base model."""

    FIXED_DENSE = "fixed dense", "the same for every input; every output of the host module is changed"
    FIXED_SPARSE = "fixed sparse", "the same for every input; some outputs or weights of the host do not change"
    DYNAMIC = "dynamic", "the input (attention, routers) or training decides which parts take effect"


class ParametersAdapted(Word):
    """What is trained in relation to the base's parameters."""

    ADDITION = (
        "addition",
        "it adds parameters to the computation that no change of the base's own parameters could replace",
    )
    REPARAMETERISATION = "reparameterisation", "its trainable parameters encode a change of the base's own parameters"


class ParameterSharing(Word):
    """Whether modules at different sites, or profiles, use the same parameters."""

    NONE = "none", "each site has its own parameters"
    SHARED = "shared", "sites or profiles use common parameters, and each has further parameters of its own"
    TIED = "tied", "all sites share every trainable parameter"


class InputType(Word):
    """What the module reads."""

    HIDDEN = "hidden representation", "it reads activations of the base"
    DATA = "data (embedding)", "it is, or reads, token embeddings"
    WEIGHTS = "weights", "it computes its effect from the base's weights, or replaces some of them"
    NONE = "none", "ours: it reads nothing; what it adds is the same for every input"


class InsertionForm(Word):
    """Where the module sits."""

    SEQUENTIAL = "sequential", "before or after the host module: it transforms the module's input or output"
    PARALLEL = "parallel", "beside the host module: it reads the same input, and its output joins the host's"
    IN_PLACE = "in place", "ours: it replaces weights of the host; no module is wrapped around it"


class Insertions(Word):
    """How many sites there are, with the method's defaults."""

    ONE = "one site", "one module of the model"
    SOME_LAYERS = "n layers", "some of the blocks, set in the config"
    ALL_LAYERS = "all layers", "every block"


class IntegrationForm(Word):
    """How the module's output joins the base's."""

    CONCATENATION = "concatenation", "it lengthens the sequence, or what attention reads"
    DIRECT_ADDITION = "direct addition", "it is added, with factor one by default"
    SCALED_ADDITION = "scaled addition", "it is multiplied by a constant from the config, then added"
    GATED_ADDITION = "gated addition", "it is multiplied by a trained scalar or a router's output, then added"
    RESCALING = "rescaling", "each element is multiplied by a trained factor"
    COMPOSITION = "composition", "ours: the host's input or output is multiplied by a trained matrix"
    REPLACEMENT = "replacement", "ours: the output of the host's own weights is not used"


class Workspace(Word):
    """The part of the base that a module works on."""

    EMBEDDING = "embedding", "token embeddings"
    ATTENTION_QUERY = "attention Q", "query projection, alone or in a fused projection"
    ATTENTION_KEY = "attention K", "key projection, alone or in a fused projection"
    ATTENTION_VALUE = "attention V", "value projection, alone or in a fused projection"
    ATTENTION_OUTPUT = "attention output", "attention's output projection"
    ATTENTION = "attention", "ours: attention as a whole"
    FFN_INTERMEDIATE = "FFN intermediate", "up and gate projections"
    FFN_OUTPUT = "FFN output", "down projection"
    NORMALISATION = "normalisation", "ours: LayerNorm, RMSNorm and similar"
    BLOCK = "block", "ours: whole transformer blocks"
    HEAD = "head", "ours: everything after the last block"
    OTHER = "other", "ours: a module with an unknown name"


PROPERTIES: dict[str, str] = {
    "intra_connectivity": "intra-connectivity",
    "inter_connectivity": "inter-connectivity",
    "parameters_adapted": "parameters adapted",
    "parameter_sharing": "parameter sharing",
    "input_type": "input type",
    "insertion_form": "insertion form",
    "insertions": "number of insertions",
    "integration_form": "integration form",
    "workspace": "workspace",
}
"""The fields of a card that are PEFT-Ref properties, with their names in the paper."""
