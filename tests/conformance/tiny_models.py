"""Tiny stand-ins for the models that PEFT's suites would fetch from the Hub: same architecture, random weights."""

from pathlib import Path

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    DebertaConfig,
    DebertaV2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
    RobertaConfig,
    T5Config,
)
from transformers.utils.logging import disable_progress_bar

IDS = dict(vocab_size=64, pad_token_id=0, bos_token_id=62, eos_token_id=63)
WIDE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37)
ENCODER = {**IDS, **WIDE, "max_position_embeddings": 64, "num_labels": 2}
DECODER = {**IDS, **WIDE, "num_key_value_heads": 2, "initializer_range": 0.2}
GPT = {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
OPT = dict(num_hidden_layers=2, init_std=0.2)
BART = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)

MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        AutoModelForCausalLM,
        OPTConfig(**IDS, hidden_size=16, num_attention_heads=4, ffn_dim=4, word_embed_proj_dim=16, **OPT),
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (AutoModelForCausalLM, GPT2Config(**GPT)),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (AutoModelForCausalLM, GPTJConfig(**GPT, rotary_dim=4)),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (AutoModelForCausalLM, LlamaConfig(**DECODER)),
    "peft-internal-testing/tiny-dummy-qwen2": (AutoModelForCausalLM, Qwen2Config(**DECODER)),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        AutoModelForCausalLM,
        Gemma3TextConfig(**DECODER, head_dim=8, tie_word_embeddings=False),
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        AutoModelForSeq2SeqLM,
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, decoder_start_token_id=0),
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        AutoModelForSeq2SeqLM,
        BartConfig(**IDS, **BART, encoder_ffn_dim=4, decoder_ffn_dim=4, decoder_start_token_id=63, init_std=0.2),
    ),
    "peft-internal-testing/tiny-random-BertModel": (AutoModel, BertConfig(**ENCODER)),
    "peft-internal-testing/tiny-random-RobertaModel": (AutoModel, RobertaConfig(**ENCODER)),
    "peft-internal-testing/tiny-random-DebertaModel": (AutoModel, DebertaConfig(**ENCODER)),
    "peft-internal-testing/tiny-random-DebertaV2Model": (AutoModel, DebertaV2Config(**ENCODER)),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        AutoModelForSequenceClassification,
        BertConfig(**ENCODER),
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        AutoModelForSequenceClassification,
        RobertaConfig(**ENCODER),
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        AutoModelForSequenceClassification,
        LlamaConfig(**DECODER, num_labels=1),
    ),
}


COMMIT = "0" * 40


def save_models(cache: Path) -> None:
    """Save every model in a Hub cache, as if it had been fetched before."""
    disable_progress_bar()
    for name, (auto_class, config) in MODELS.items():
        for field in vars(config):
            if "drop" in field and isinstance(getattr(config, field), float):
                setattr(config, field, 0.0)  # the suites compare a pass with the next, also in training mode
        repo = cache / f"models--{name.replace('/', '--')}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(COMMIT, encoding="utf-8")
        torch.manual_seed(0)
        auto_class.from_config(config).save_pretrained(repo / "snapshots" / COMMIT)
