"""The base models of the matrix: one row each, small enough to build for every test."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 40
TOKENS = torch.randint(3, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Architecture:
    """A base model, a batch for it, and what a config must say about it.

    Attributes:
        make: builds the model; always called with the same seed.
        batch: keyword arguments of a forward pass, three examples.
        fields: config fields it needs, such as ``target_modules`` where there is no default.
        site: name of its first site.
        generates: whether it has ``generate``.
        checkpoints: whether it can checkpoint gradients.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: dict[str, Tensor]
    site: str
    fields: dict[str, Any] = field(default_factory=dict)
    generates: bool = False
    checkpoints: bool = True

    @property
    def from_transformers(self) -> bool:
        return "task_type" in self.fields

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().eval()

    @property
    def prompt(self) -> dict[str, Tensor]:
        """The part of the batch that generation starts from."""
        return {name: self.batch[name] for name in ("input_ids", "attention_mask")}


def bert() -> nn.Module:
    return BertModel(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=24,
            initializer_range=0.2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def gpt2() -> nn.Module:
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    dropouts = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    sizes = dict(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropouts, **ids, initializer_range=0.2))


def t5() -> nn.Module:
    sizes = dict(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class MLP(nn.Module):
    """A model that neither is nor resembles one of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"layers": nn.ModuleList([Block(10), Block(10)])})
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.head.weight.dtype)
        for layer in self.body["layers"]:
            x = layer(x)
        return self.head(x)


TEXT = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}

ARCHITECTURES = [
    Architecture("bert", bert, TEXT, "encoder.layer.0.output.dense", {"task_type": "FEATURE_EXTRACTION"}),
    Architecture("llama", llama, TEXT, "model.layers.0.mlp.down_proj", {"task_type": "CAUSAL_LM"}, generates=True),
    Architecture("gpt2", gpt2, TEXT, "transformer.h.0.mlp.c_proj", {"task_type": "CAUSAL_LM"}, generates=True),
    Architecture(
        "t5",
        t5,
        {**TEXT, "decoder_input_ids": TOKENS[:, :4]},
        "encoder.block.0.layer.1.DenseReluDense.wo",
        {"task_type": "SEQ_2_SEQ_LM"},
        generates=True,
    ),
    Architecture(
        "mlp",
        MLP,
        {"x": torch.randn(3, 10, generator=torch.Generator().manual_seed(6))},
        "body.layers.0.down",
        {"target_modules": ["down"]},
        checkpoints=False,
    ),
]
