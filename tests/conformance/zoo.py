"""A tiny random model of each of the architectures that people use most, and a batch for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 40
IMAGE_TOKEN = VOCABULARY - 1
WIDE: dict[str, Any] = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
TEXT: dict[str, Any] = {**WIDE, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER: dict[str, Any] = {**TEXT, "max_position_embeddings": 32}
DECODER: dict[str, Any] = {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2}
EXPERTS: dict[str, Any] = {**DECODER, "num_experts_per_tok": 2}
IMAGE: dict[str, Any] = {**WIDE, "image_size": 8, "patch_size": 4}
SEQ2SEQ: dict[str, Any] = dict(
    vocab_size=VOCABULARY, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=2, max_position_embeddings=32,
)  # fmt: skip
MROPE: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
LINEAR_ATTENTION: dict[str, Any] = dict(
    layer_types=["linear_attention", "full_attention"], linear_key_head_dim=8, linear_num_key_heads=2,
    linear_num_value_heads=2, linear_value_head_dim=8,
)  # fmt: skip
NO_HEAD_DIM: dict[str, Any] = {name: value for name, value in DECODER.items() if name != "head_dim"}
SOUND: dict[str, Any] = dict(conv_dim=(8, 8), conv_stride=(4, 4), conv_kernel=(4, 4), num_conv_pos_embeddings=4)
SOUND |= dict(num_feat_extract_layers=2, num_conv_pos_embedding_groups=2)


@dataclass(frozen=True)
class Kind:
    """One architecture.

    Attributes:
        name: as it is known; the rest of a row of the table follows from the model.
        make: builds a tiny model with random weights.
        batch: makes the keyword arguments of a forward pass.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]

    def build(self) -> nn.Module:
        """The model, the same one each time, in eval mode."""
        torch.manual_seed(0)
        model = self.make()
        with torch.no_grad():
            for parameter in model.parameters():  # no zeros and no equal numbers: an adapter has something to read
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()


class PlainEncoder(nn.Module):
    """PyTorch's own encoder, as people put it into their models."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        out: Tensor = self.encoder(x, src_key_padding_mask=padding)
        return out


def _text() -> dict[str, Tensor]:
    tokens = torch.randint(3, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(5))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _tokens_alone() -> dict[str, Tensor]:
    return {"input_ids": _text()["input_ids"]}


def _text_pair() -> dict[str, Tensor]:
    text = _text()
    return {**text, "decoder_input_ids": text["input_ids"][:, :4]}


def _image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(6))}


def _image_and_text() -> dict[str, Tensor]:
    return {**_text(), **_image()}


def _patches_and_text() -> dict[str, Tensor]:
    """An image as SigLIP 2 takes it: four patches of twelve numbers, and their grid."""
    patches = torch.randn(3, 4, 48, generator=torch.Generator().manual_seed(6))
    grid = torch.tensor([[2, 2]] * 3)
    return {**_text(), "pixel_values": patches, "pixel_attention_mask": torch.ones(3, 4), "spatial_shapes": grid}


def _image_inside_text(tokens: int, **more: Tensor) -> dict[str, Tensor]:
    """Text in which the image takes the place of some tokens, which have the number ``IMAGE_TOKEN``."""
    text = _text()
    text["input_ids"][:, 1 : 1 + tokens] = IMAGE_TOKEN
    return {**text, **_image(), **more}


def _for_gemma_3() -> dict[str, Tensor]:
    return _image_inside_text(4, token_type_ids=torch.tensor([[0, 1, 1, 1, 1, 0]] * 3))


def _for_gemma_4() -> dict[str, Tensor]:
    patches = torch.rand(3, 4, 48, generator=torch.Generator().manual_seed(6))
    positions = torch.tensor([[[0, 0], [1, 0], [0, 1], [1, 1]]] * 3)
    kinds = torch.tensor([[0, 1, 0, 0, 0, 0]] * 3)
    batch = _image_inside_text(1, image_position_ids=positions, mm_token_type_ids=kinds)
    return {**batch, "pixel_values": patches}


def _for_llama_4() -> dict[str, Tensor]:
    return _image_inside_text(1)


def _for_qwen() -> dict[str, Tensor]:
    """Three images of four patches, which the model merges into one."""
    patches = torch.randn(12, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(6))
    kinds = torch.tensor([[0, 1, 0, 0, 0, 0]] * 3)
    batch = _image_inside_text(1, image_grid_thw=torch.tensor([[1, 2, 2]] * 3), mm_token_type_ids=kinds)
    return {**batch, "pixel_values": patches}


def _for_llava() -> dict[str, Tensor]:
    return _image_inside_text(4)


def _for_mistral_3() -> dict[str, Tensor]:
    return _image_inside_text(1, image_sizes=torch.tensor([[8, 8]] * 3))


def _sound() -> dict[str, Tensor]:
    return {"input_values": torch.randn(3, 400, generator=torch.Generator().manual_seed(7))}


def _spectrum() -> dict[str, Tensor]:
    features = torch.randn(3, 8, 40, generator=torch.Generator().manual_seed(8))
    return {"input_features": features, "decoder_input_ids": _text()["input_ids"][:, :4]}


def _vectors() -> dict[str, Tensor]:
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(9))
    return {"x": x, "padding": torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 5])}


def _of(model: str, config: str, batch: Callable[[], dict[str, Tensor]] = _text, /, **fields: Any) -> Kind:
    def make() -> nn.Module:
        settings = getattr(transformers, config)(**fields)
        settings._attn_implementation = "eager"
        return getattr(transformers, model)(settings)  # type: ignore[no-any-return]

    return Kind(model, make, batch)


def _pair(
    model: str,
    family: str,
    batch: Callable[[], dict[str, Tensor]],
    text: dict[str, Any],
    vision: dict[str, Any],
    vision_config: str = "",
    text_config: str = "",
    /,
    **fields: Any,
) -> Kind:
    """A model with a config for text and one for images.

    Args:
        family: what the names of its configs begin with.
        vision_config, text_config: names of the classes of the two configs, if they do not follow from the family.
    """

    def make() -> nn.Module:
        parts = dict(
            text_config=getattr(transformers, text_config or f"{family}TextConfig")(**text).to_dict(),
            vision_config=getattr(transformers, vision_config or f"{family}VisionConfig")(**vision).to_dict(),
        )
        settings = getattr(transformers, f"{family}Config")(**parts, **fields)
        settings._attn_implementation = "eager"
        return getattr(transformers, model)(settings)  # type: ignore[no-any-return]

    return Kind(model, make, batch)


ZOO = [
    _of("BertModel", "BertConfig", **ENCODER),
    _of("RobertaModel", "RobertaConfig", **ENCODER),
    _of("DistilBertModel", "DistilBertConfig", vocab_size=VOCABULARY, dim=16, n_layers=2, n_heads=2, hidden_dim=24),
    _of("AlbertModel", "AlbertConfig", **ENCODER, embedding_size=8),
    _of("DebertaV2Model", "DebertaV2Config", **ENCODER),
    _of("ModernBertModel", "ModernBertConfig", **ENCODER, cls_token_id=1, sep_token_id=2),
    _of("MPNetModel", "MPNetConfig", **ENCODER),
    _of("ElectraModel", "ElectraConfig", **ENCODER, embedding_size=8),
    _of("GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32),
    _of("OPTForCausalLM", "OPTConfig", vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, ffn_dim=24,
        num_attention_heads=2, max_position_embeddings=32, word_embed_proj_dim=16),
    _of("GPTNeoXForCausalLM", "GPTNeoXConfig", **TEXT),
    _of("LlamaForCausalLM", "LlamaConfig", **DECODER),
    _of("MistralForCausalLM", "MistralConfig", **DECODER),
    _of("Qwen2ForCausalLM", "Qwen2Config", **NO_HEAD_DIM),
    _of("Qwen3ForCausalLM", "Qwen3Config", **DECODER),
    _of("Gemma2ForCausalLM", "Gemma2Config", **DECODER),
    _of("Gemma3ForCausalLM", "Gemma3TextConfig", **DECODER),
    _of("Phi3ForCausalLM", "Phi3Config", **NO_HEAD_DIM),
    _of("SmolLM3ForCausalLM", "SmolLM3Config", **DECODER),
    _of("Olmo3ForCausalLM", "Olmo3Config", **NO_HEAD_DIM),
    _of("GraniteForCausalLM", "GraniteConfig", **NO_HEAD_DIM),
    _of("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", **DECODER, **LINEAR_ATTENTION),
    _of("MixtralForCausalLM", "MixtralConfig", **EXPERTS, num_local_experts=4),
    _of("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **{k: v for k, v in EXPERTS.items() if k != "head_dim"},
        num_experts=4, moe_intermediate_size=12, shared_expert_intermediate_size=20),
    _of("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **EXPERTS, num_experts=4, moe_intermediate_size=12),
    _of("GptOssForCausalLM", "GptOssConfig", **EXPERTS, num_local_experts=4),
    _of("Llama4ForCausalLM", "Llama4TextConfig", **EXPERTS, num_local_experts=4, intermediate_size_mlp=20,
        interleave_moe_layer_step=2),
    _of("Gemma4ForCausalLM", "Gemma4TextConfig", **DECODER, hidden_size_per_layer_input=0),
    _of("MambaForCausalLM", "MambaConfig", _tokens_alone, vocab_size=VOCABULARY, hidden_size=16, state_size=4,
        num_hidden_layers=2, time_step_rank=2),
    _of("Mamba2ForCausalLM", "Mamba2Config", _tokens_alone, vocab_size=VOCABULARY, hidden_size=16, state_size=4,
        num_hidden_layers=2, num_heads=4, head_dim=8, n_groups=1, expand=2),
    _of("T5ForConditionalGeneration", "T5Config", _text_pair, vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24,
        num_layers=2, num_heads=2, decoder_start_token_id=0),
    _of("BartForConditionalGeneration", "BartConfig", _text_pair, **SEQ2SEQ),
    _of("WhisperForConditionalGeneration", "WhisperConfig", _spectrum, **{
        **{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"}, "num_mel_bins": 8,
        "max_source_positions": 20, "max_target_positions": 32, "suppress_tokens": None,
        "begin_suppress_tokens": None}),
    _of("ViTModel", "ViTConfig", _image, **IMAGE),
    _of("SwinModel", "SwinConfig", _image, image_size=8, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2],
        window_size=2),
    _of("Wav2Vec2Model", "Wav2Vec2Config", _sound, **WIDE, **SOUND, mask_time_prob=0.0, layerdrop=0.0),
    _of("Dinov2Model", "Dinov2Config", _image, **{k: v for k, v in IMAGE.items() if k != "intermediate_size"}),
    _of("DINOv3ViTModel", "DINOv3ViTConfig", _image, **IMAGE),
    _pair("CLIPModel", "CLIP", _image_and_text, ENCODER, IMAGE, projection_dim=16),
    _pair("SiglipModel", "Siglip", _image_and_text, ENCODER, IMAGE),
    _pair("Siglip2Model", "Siglip2", _patches_and_text, ENCODER, {**WIDE, "patch_size": 4, "num_patches": 4}),
    _pair("Gemma3ForConditionalGeneration", "Gemma3", _for_gemma_3, DECODER,
        {**IMAGE, "vision_use_head": False}, "SiglipVisionConfig",
        mm_tokens_per_image=4, image_token_index=IMAGE_TOKEN),
    _pair("Gemma4ForConditionalGeneration", "Gemma4", _for_gemma_4, {**DECODER, "hidden_size_per_layer_input": 0},
        {**WIDE, "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 2},
        image_token_id=IMAGE_TOKEN),
    _pair("Llama4ForConditionalGeneration", "Llama4", _for_llama_4,
        {**EXPERTS, "num_local_experts": 4, "intermediate_size_mlp": 20, "interleave_moe_layer_step": 2},
        {**IMAGE, "intermediate_size": 64, "vision_output_dim": 16, "projector_input_dim": 16,
        "projector_output_dim": 16}, image_token_index=IMAGE_TOKEN),
    _pair("Qwen3VLForConditionalGeneration", "Qwen3VL", _for_qwen, {**DECODER, **MROPE},
        dict(hidden_size=16, depth=2, num_heads=2, intermediate_size=24, patch_size=4, out_hidden_size=16,
        num_position_embeddings=16, deepstack_visual_indexes=[0]), image_token_id=IMAGE_TOKEN),
    _pair("Qwen2VLForConditionalGeneration", "Qwen2VL", _for_qwen, {**NO_HEAD_DIM, **MROPE},
        dict(embed_dim=16, hidden_size=16, depth=2, num_heads=2, mlp_ratio=2, patch_size=4),
        image_token_id=IMAGE_TOKEN),
    _pair("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VL", _for_qwen, {**NO_HEAD_DIM, **MROPE},
        dict(hidden_size=16, depth=2, num_heads=2, intermediate_size=24, patch_size=4, out_hidden_size=16,
        window_size=16, fullatt_block_indexes=[1]), image_token_id=IMAGE_TOKEN),
    _pair("Qwen3_5ForConditionalGeneration", "Qwen3_5", _for_qwen, {**DECODER, **LINEAR_ATTENTION, **MROPE},
        dict(hidden_size=16, depth=2, num_heads=2, intermediate_size=24, patch_size=4, out_hidden_size=16,
        num_position_embeddings=16), image_token_id=IMAGE_TOKEN),
    _pair("LlavaForConditionalGeneration", "Llava", _for_llava, DECODER, IMAGE, "CLIPVisionConfig", "LlamaConfig",
        image_token_index=IMAGE_TOKEN, vision_feature_layer=-1),
    _pair("Mistral3ForConditionalGeneration", "Mistral3", _for_mistral_3, DECODER, {**IMAGE, "head_dim": 8},
        "PixtralVisionConfig", "MistralConfig", image_token_index=IMAGE_TOKEN),
    Kind("nn.TransformerEncoder", PlainEncoder, _vectors),
]  # fmt: skip
