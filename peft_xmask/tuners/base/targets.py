"""Where adapters go by default: the feed-forward network of each block.

Each value is a regular expression for the full module name, as PEFT takes it in ``target_modules``. The FFN output is
where the adapters of Pfeiffer et al. (arXiv 2005.00247), and so those of X-PEFT, sit; a weight adapter reads every
linear layer of the network, as HiWi (arXiv 2305.16742). docs/architectures.md shows what each default covers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn


@dataclass(frozen=True)
class Family:
    """Architectures whose blocks name their modules alike.

    Attributes:
        output: regular expression of the last module of each feed-forward network.
        linear: of all its linear layers, or of its fused experts.
        model_types: values of ``config.model_type``.
    """

    output: str
    linear: str
    model_types: tuple[str, ...]


def _in_block(block: str, output: str, linear: str, model_types: tuple[str, ...]) -> Family:
    """Of names behind ``<block>.<number>.``."""
    head = rf"(?:.*\.)?{block}\.\d+\."
    return Family(head + output, head + linear, model_types)


LANGUAGE_BLOCK = r"language_model\.(?:.*\.)?layers"
"""Of a model that reads images too: the blocks of its language model, which works on batches without images as well."""

FAMILIES = (
    _in_block("layer", r"output\.dense", r"(?:intermediate|output)\.dense", (
        "bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta", "deberta-v2", "mpnet",
    )),
    _in_block("layer", r"ffn\.lin2", r"ffn\.(?:lin1|lin2)", ("distilbert",)),
    _in_block("albert_layers", "ffn_output", "(?:ffn|ffn_output)", ("albert",)),
    _in_block("layers", r"mlp\.Wo", r"mlp\.(?:Wi|Wo)", ("modernbert", "modernbert-decoder")),
    _in_block("layers", r"mlp\.down_proj", r"mlp\.(?:gate_proj|up_proj|gate_up_proj|down_proj)", (
        "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gemma4_text", "phi3", "olmo", "olmo2",
        "smollm3", "olmo3", "granite", "qwen3_5_text",
    )),
    _in_block("layers", r"mlp\.(?:experts|down_proj)", r"mlp\.(?:experts|gate_proj|up_proj|down_proj)", (
        "mixtral", "qwen3_moe", "gpt_oss",
    )),
    _in_block("layers", r"mlp\.(?:experts|shared_expert\.down_proj|down_proj)",
              r"mlp\.(?:shared_expert\.)?(?:gate_proj|up_proj|down_proj)", ("qwen2_moe",)),
    _in_block("layers", r"feed_forward\.(?:shared_expert\.)?down_proj",
              r"feed_forward\.(?:shared_expert\.)?(?:gate_proj|up_proj|down_proj)", ("llama4_text",)),
    _in_block(LANGUAGE_BLOCK, r"mlp\.down_proj", r"mlp\.(?:gate_proj|up_proj|down_proj)", (
        "gemma3", "gemma4", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "llava", "mistral3",
    )),
    _in_block(LANGUAGE_BLOCK, r"feed_forward\.(?:shared_expert\.)?down_proj",
              r"feed_forward\.(?:shared_expert\.)?(?:gate_proj|up_proj|down_proj)", ("llama4",)),
    _in_block("layers", "fc2", "(?:fc1|fc2)", ("opt", "bart", "mbart", "whisper")),
    _in_block("layers", r"mlp\.fc2", r"mlp\.(?:fc1|fc2)", (
        "vit", "deit", "phi", "clip", "clip_text_model", "clip_vision_model", "siglip", "siglip_text_model",
        "siglip_vision_model", "siglip2", "siglip2_text_model", "siglip2_vision_model",
    )),
    _in_block("layer", r"mlp\.fc2", r"mlp\.(?:fc1|fc2)", ("dinov2",)),
    _in_block("layer", r"mlp\.down_proj", r"mlp\.(?:gate_proj|up_proj|down_proj)", ("dinov3_vit",)),
    _in_block("blocks", r"mlp\.fc2", r"mlp\.(?:fc1|fc2)", ("swin",)),
    _in_block("layers", r"feed_forward\.output_dense", r"feed_forward\.(?:intermediate_dense|output_dense)", (
        "wav2vec2", "hubert", "wavlm",
    )),
    _in_block("h", r"mlp\.c_proj", r"mlp\.(?:c_fc|c_proj)", ("gpt2", "gpt_neo")),
    _in_block("h", r"mlp\.fc_out", r"mlp\.(?:fc_in|fc_out)", ("gptj",)),
    _in_block("(?:layers|h)", r"mlp\.dense_4h_to_h", r"mlp\.(?:dense_h_to_4h|dense_4h_to_h)", (
        "gpt_neox", "bloom", "falcon",
    )),
    _in_block("block", r"layer\.\d+\.DenseReluDense\.wo", r"layer\.\d+\.DenseReluDense\.(?:wi|wi_0|wi_1|wo)", (
        "t5", "mt5", "umt5",
    )),
    _in_block("layers", r"mixer\.in_proj", r"mixer\.in_proj", ("mamba", "mamba2", "falcon_mamba")),
)  # fmt: skip
"""Mamba's blocks have no feed-forward network, and fused kernels read their output projection without calling it."""

FFN_OUTPUT: Mapping[str, str] = MappingProxyType(
    {each: family.output for family in FAMILIES for each in family.model_types}
)
"""Regular expression of the FFN output projections, by ``config.model_type``."""

FFN_LINEAR: Mapping[str, str] = MappingProxyType(
    {each: family.linear for family in FAMILIES for each in family.model_types}
)
"""Regular expression of all linear layers of the FFN, gates included, by ``config.model_type``."""


def torch_blocks(model: nn.Module, *, output_only: bool) -> set[str]:
    """Names of the linear layers of the feed-forward networks in PyTorch's own transformer layers.

    Args:
        output_only: the last one of each network alone.
    """
    own = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    blocks = [name for name, module in model.named_modules() if isinstance(module, own)]
    names = ("linear2",) if output_only else ("linear1", "linear2")
    return {f"{block}.{name}".removeprefix(".") for block in blocks for name in names}
