"""A tiny language model that vLLM's CPU attention takes, banks over it, and what transformers makes of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from peft_xmask import XPEFTConfig
from peft_xmask.bank.bank import ProfileBank
from peft_xmask.core.packing import pack_bits, pack_halves

HEAD_SIZE = 32
"""The smallest head that vLLM's CPU attention takes; stories260k's heads have 8."""

TOKENS = 24
NEAR_TIE = 1e-4
"""Gap of the two largest logits below which two correct programs may choose differently."""

OPENINGS = ("Once upon a time", "Lily and the dog", "The old man saw", "One day, a girl", "Tom had a red ball")


def make_base(target: Path) -> None:
    """Write the real stories260k with its heads widened, or, where the shared data are not, a random Llama."""
    data = Path(os.environ.get("PEFT_XMASK_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))
    if (data / "stories260k-llama").is_dir():
        widen_heads(data / "stories260k-llama", target)
    else:
        make_random_base(target)


def make_random_base(target: Path) -> None:
    """Write a random Llama with heads of 32 numbers and a tokenizer of the words of the openings."""
    words = sorted({word for text in OPENINGS for word in text.split()})
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(target)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=172, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=4, head_dim=HEAD_SIZE, max_position_embeddings=512, initializer_range=0.1,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(target)


def widen_heads(source: Path, target: Path) -> None:
    """Write a Llama as the same function with heads of 32 numbers.

    RoPE turns the pairs (i, i + d/2) at the frequency ``theta ** (-2i / d)``; in a head f times as wide the pair with
    that frequency is f i. Numbers between are zero. Scores are divided by the root of the head's size, so queries grow
    by the root of f, a power of two: greedy outputs are identical.
    """
    config = json.loads((source / "config.json").read_text())
    size = config["head_dim"]
    factor = HEAD_SIZE // size
    assert HEAD_SIZE % size == 0
    assert factor == 4  # its root is a power of two
    half = torch.arange(size // 2) * factor
    places = torch.cat([half, half + HEAD_SIZE // 2])
    tensors = {}
    for name, weight in load_file(source / "model.safetensors").items():
        part = name.split(".")[-2]
        wide = weight
        if part in ("q_proj", "k_proj", "v_proj"):
            heads = weight.view(-1, size, weight.shape[1])
            wide = weight.new_zeros(len(heads), HEAD_SIZE, weight.shape[1])
            wide[:, places] = heads * (2.0 if part == "q_proj" else 1.0)
            wide = wide.flatten(0, 1)
        elif part == "o_proj":
            heads = weight.view(len(weight), -1, size)
            wide = weight.new_zeros(len(weight), heads.shape[1], HEAD_SIZE)
            wide[:, :, places] = heads
            wide = wide.flatten(1)
        tensors[name] = wide.contiguous()
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps({**config, "head_dim": HEAD_SIZE}, indent=1))
    for file in ("generation_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / file, target / file)


def make_bank(
    base: Path, folder: Path, count: int, *, seed: int = 0, form: str = "parallel", bottleneck: int = 8, **fields: Any
) -> ProfileBank:
    """A saved bank of profiles with random masks and gains around 1, so that people's stories differ."""
    config = XPEFTConfig(
        task_type="CAUSAL_LM",
        activation="identity",
        insertion_form=form,
        num_adapters=64,
        bottleneck_size=bottleneck,
        **fields,
    )
    bank = ProfileBank.from_model(get_peft_model(AutoModelForCausalLM.from_pretrained(base), config))
    bank.config.base_model_name_or_path = str(base)
    draws = torch.Generator().manual_seed(seed)
    spec = bank.spec
    bits = torch.empty(count, *spec.bits_shape[1:], dtype=torch.uint8)
    gains = None if not spec.learn_gain else torch.empty(count, *spec.gain_shape[1:], dtype=torch.uint8)
    for start in range(0, count, 10_000):
        some = slice(start, min(start + 10_000, count))
        rows = some.stop - start
        order = torch.rand(rows, 2, spec.num_sites, spec.num_adapters, generator=draws).argsort(-1)
        bits[some] = pack_bits(order < spec.top_k)
        if gains is not None:
            values = 0.5 + torch.rand(rows, spec.num_sites, 1, generator=draws)
            gains[some] = pack_halves(values)
    made = ProfileBank(bank.config, bits, gains, [f"person-{number}" for number in range(count)])
    made.config.num_profiles = count
    made.save_pretrained(folder)
    return ProfileBank.from_pretrained(folder)


@dataclass(frozen=True)
class Story:
    """A greedy continuation.

    Attributes:
        tokens: of the continuation.
        sure: how many of them, from the first, come before the first near-tie.
    """

    tokens: list[int]
    sure: int

    def agrees(self, tokens: Sequence[int]) -> bool:
        """Whether other tokens are these, as far as they are sure."""
        return list(tokens[: self.sure]) == self.tokens[: self.sure]


def prompts_of(base: Path) -> list[list[int]]:
    """Openings of stories as tokens, all of one length."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    found = [tokenizer(text)["input_ids"] for text in OPENINGS]
    length = min(map(len, found))
    return [tokens[:length] for tokens in found]


def expected(base: Path, bank: ProfileBank, wanted: Sequence[tuple[str | None, Sequence[int]]]) -> list[Story]:
    """What transformers writes for people (None: the base) and prompts of one length, 50 at a time."""
    served = bank.attach(AutoModelForCausalLM.from_pretrained(base))
    stories = []
    for start in range(0, len(wanted), 50):
        some = wanted[start : start + 50]
        prompts = torch.tensor([list(prompt) for _, prompt in some])
        with torch.no_grad():
            out = served.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=TOKENS,
                adapter_names=[name or "__base__" for name, _ in some], output_logits=True,
                return_dict_in_generate=True, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        logits = torch.stack(out.logits, dim=1).float()  # [B, T, V]
        stories += [_story(tokens[-TOKENS:], each) for tokens, each in zip(out.sequences, logits, strict=True)]
    return stories


def _story(tokens: Tensor, logits: Tensor) -> Story:
    best = logits.topk(2, dim=-1).values
    close = (best[:, 0] - best[:, 1] < NEAR_TIE).nonzero()
    return Story(tokens.tolist(), int(close[0]) if len(close) else TOKENS)
