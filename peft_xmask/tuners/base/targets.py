"""Where adapters go by default: the feed-forward network of each block.

Each value is a regular expression for the full module name, as PEFT takes it in ``target_modules``. The FFN output is
where the adapters of Pfeiffer et al. (arXiv 2005.00247), and so those of X-PEFT, sit; a weight adapter reads every
linear layer of the network, as HiWi (arXiv 2305.16742).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_BERT_LIKE = r"(?:.*\.)?layer\.\d+\.output\.dense"
_LLAMA_LIKE = r"(?:.*\.)?layers\.\d+\.mlp\.down_proj"
_FC2 = r"(?:.*\.)?layers\.\d+\.fc2"
_MLP_FC2 = r"(?:.*\.)?layers\.\d+\.mlp\.fc2"
_GPT2_LIKE = r"(?:.*\.)?h\.\d+\.mlp\.c_proj"
_NEOX_LIKE = r"(?:.*\.)?(?:layers|h)\.\d+\.mlp\.dense_4h_to_h"
_T5_LIKE = r"(?:.*\.)?block\.\d+\.layer\.\d+\.DenseReluDense\.wo"
_DISTILBERT = r"(?:.*\.)?transformer\.layer\.\d+\.ffn\.lin2"
_GPTJ = r"(?:.*\.)?h\.\d+\.mlp\.fc_out"

_FAMILIES: Mapping[str, tuple[str, ...]] = {
    _BERT_LIKE: (
        "bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta", "deberta-v2", "mpnet",
    ),
    _LLAMA_LIKE: (
        "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo", "olmo2",
    ),
    _FC2: ("opt", "bart", "mbart", "whisper"),
    _MLP_FC2: ("vit", "deit", "phi", "clip_vision_model", "siglip_vision_model"),
    _GPT2_LIKE: ("gpt2", "gpt_neo"),
    _NEOX_LIKE: ("gpt_neox", "bloom", "falcon"),
    _T5_LIKE: ("t5", "mt5", "umt5"),
    _DISTILBERT: ("distilbert",),
    _GPTJ: ("gptj",),
}  # fmt: skip

_WHOLE_NETWORK: Mapping[str, str] = {
    _BERT_LIKE: r"(?:.*\.)?layer\.\d+\.(?:intermediate|output)\.dense",
    _LLAMA_LIKE: r"(?:.*\.)?layers\.\d+\.mlp\.(?:gate_proj|up_proj|gate_up_proj|down_proj)",
    _FC2: r"(?:.*\.)?layers\.\d+\.(?:fc1|fc2)",
    _MLP_FC2: r"(?:.*\.)?layers\.\d+\.mlp\.(?:fc1|fc2)",
    _GPT2_LIKE: r"(?:.*\.)?h\.\d+\.mlp\.(?:c_fc|c_proj)",
    _NEOX_LIKE: r"(?:.*\.)?(?:layers|h)\.\d+\.mlp\.(?:dense_h_to_4h|dense_4h_to_h)",
    _T5_LIKE: r"(?:.*\.)?block\.\d+\.layer\.\d+\.DenseReluDense\.(?:wi|wi_0|wi_1|wo)",
    _DISTILBERT: r"(?:.*\.)?transformer\.layer\.\d+\.ffn\.(?:lin1|lin2)",
    _GPTJ: r"(?:.*\.)?h\.\d+\.mlp\.(?:fc_in|fc_out)",
}

FFN_OUTPUT: Mapping[str, str] = MappingProxyType(
    {model_type: pattern for pattern, model_types in _FAMILIES.items() for model_type in model_types}
)
"""Regular expression of the FFN output projections, by ``config.model_type``."""

FFN_LINEAR: Mapping[str, str] = MappingProxyType(
    {model_type: _WHOLE_NETWORK[pattern] for model_type, pattern in FFN_OUTPUT.items()}
)
"""Regular expression of all linear layers of the FFN, gates included, by ``config.model_type``."""
