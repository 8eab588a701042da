"""PEFT-Ref's words: the properties by which methods are told apart, and the rule by which we give each value.

The properties are those of Sabry & Belz (arXiv 2304.12410). The rules are ours: each says what has to be true of a
method's code, so that most of them can be checked by running it. Values marked "ours" are not in the paper's lists.
"""

from __future__ import annotations

from enum import Enum
from typing import Any


class Word(str, Enum):
    """A value of a property. ``rule`` says when it is given."""

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
    """How the numbers inside a module are connected."""

    DENSE = "dense", "most of the module's inputs reach most of its outputs"
    SPARSE = "sparse", "an output of the module is changed by at most half of its inputs"


class InterConnectivity(Word):
    """How a module is connected to the base model."""

    FIXED_DENSE = "fixed dense", "the same for every input; every output of the host module is changed"
    FIXED_SPARSE = "fixed sparse", "the same for every input; some numbers of the host are left as they are"
    DYNAMIC = "dynamic", "which parts take effect is chosen by the input (attention, routers) or while training"


class ParametersAdapted(Word):
    """What is trained in relation to the base's parameters."""

    ADDITION = "addition", "new parameters in the computation; no change of the base's own parameters says the same"
    REPARAMETERISATION = "reparameterisation", "the trained numbers stand for a change of the base's own parameters"


class ParameterSharing(Word):
    """Whether modules at different sites, or profiles, use the same numbers."""

    NONE = "none", "each site has numbers of its own"
    SHARED = "shared", "sites or profiles use common numbers, each with further numbers of its own"
    TIED = "tied", "every trained number is common to all sites"


class InputType(Word):
    """What the module reads."""

    HIDDEN = "hidden representation", "it reads activations of the base"
    DATA = "data (embedding)", "it is, or reads, embeddings of tokens"
    WEIGHTS = "weights", "its effect is computed from the base's weights, or replaces some of them"
    NONE = "none", "ours: it reads nothing; what it adds is the same for every input"


class InsertionForm(Word):
    """Where the module sits."""

    SEQUENTIAL = "sequential", "before or behind the host module: it sees its input or output and hands it on"
    PARALLEL = "parallel", "beside the host module: it reads the same input and joins the output"
    IN_PLACE = "in place", "ours: it takes the place of numbers of the host; nothing is put around it"


class Insertions(Word):
    """How many sites there are, with the method's defaults."""

    ONE = "one site", "one place in the model"
    SOME_LAYERS = "n layers", "some of the blocks, by a number in the config"
    ALL_LAYERS = "all layers", "every block"


class IntegrationForm(Word):
    """How the module's output joins the base's."""

    CONCATENATION = "concatenation", "the sequence, or what attention reads, gets longer"
    DIRECT_ADDITION = "direct addition", "it is added, by default with factor one"
    SCALED_ADDITION = "scaled addition", "it is added times a constant of the config"
    GATED_ADDITION = "gated addition", "it is added times a trained scalar, or a router's output"
    RESCALING = "rescaling", "each number is multiplied by a trained one"
    COMPOSITION = "composition", "ours: the host's input or output is multiplied by a trained matrix"
    REPLACEMENT = "replacement", "ours: what the host's own numbers would give does not enter"


class Workspace(Word):
    """The part of the base that a module works on."""

    EMBEDDING = "embedding", "token embeddings"
    ATTENTION_QUERY = "attention Q", "query projection, also as part of a fused one"
    ATTENTION_KEY = "attention K", "key projection, also as part of a fused one"
    ATTENTION_VALUE = "attention V", "value projection, also as part of a fused one"
    ATTENTION_OUTPUT = "attention output", "output projection of attention"
    ATTENTION = "attention", "ours: attention as a whole"
    FFN_INTERMEDIATE = "FFN intermediate", "up and gate projections"
    FFN_OUTPUT = "FFN output", "down projection"
    NORMALISATION = "normalisation", "ours: LayerNorm and its kin"
    BLOCK = "block", "ours: whole transformer blocks"
    HEAD = "head", "ours: what stands behind the last block"
    OTHER = "other", "ours: a module whose name says nothing known"


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
"""Fields of a card that are PEFT-Ref properties, and their names in the paper."""
