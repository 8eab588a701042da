"""Where adapters go by default: the output projection of the feed-forward network of each block.

Each value is a regular expression for the full module name, as PEFT takes it in ``target_modules``. The FFN output is
where the adapters of Pfeiffer et al. (arXiv 2005.00247), and so those of X-PEFT, sit.
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
    r"(?:.*\.)?transformer\.layer\.\d+\.ffn\.lin2": ("distilbert",),
    r"(?:.*\.)?h\.\d+\.mlp\.fc_out": ("gptj",),
}  # fmt: skip

FFN_OUTPUT: Mapping[str, str] = MappingProxyType(
    {model_type: pattern for pattern, model_types in _FAMILIES.items() for model_type in model_types}
)
"""Regular expression of the FFN output projections, by ``config.model_type``."""
