"""Texts as a causal language model learns them, and its loss on each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DataCollatorForTokenClassification, PreTrainedTokenizerBase

from .examples import Row, by_length, inputs_of

IGNORED = -100
"""Label of tokens that are not learnt: those of a prompt, and padding."""


@dataclass(frozen=True)
class TokenLosses:
    """Losses of texts.

    Attributes:
        nats: sum over a text's learnt tokens, float32 ``[n]``.
        tokens: how many these are, float32 ``[n]``.
    """

    nats: Tensor
    tokens: Tensor

    @property
    def per_token(self) -> Tensor:
        """Mean over a text's tokens, ``[n]``."""
        return self.nats / self.tokens.clamp_min(1)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, completion: str, max_length: int) -> Row:
    """A text to learn; with a completion, only that is learnt, and the text is its prompt.

    An end-of-text token follows, if the tokenizer has one. Where the tokens are too many, a text loses its end and a
    prompt its beginning.

    Args:
        tokenizer: of the model.
        text: the text or prompt.
        completion: what follows the prompt; empty: there is no prompt.
        max_length: most tokens.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = tokenizer(text)["input_ids"]
    if not completion:
        ids = (ids + end if ids[-1:] != end else ids)[:max_length]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(ids)}
    prompt = ids[:-1] if end and ids[-1:] == end else ids
    learnt = (tokenizer(completion, add_special_tokens=False)["input_ids"] + end)[: max_length - 1]
    prompt = prompt[-(max_length - len(learnt)) :]
    ids = prompt + learnt
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * len(prompt) + learnt}


@torch.inference_mode()
def token_losses(
    model: nn.Module, examples: Sequence[Row], tokenizer: PreTrainedTokenizerBase, rows: Tensor | None = None
) -> TokenLosses:
    """The loss of each text.

    Args:
        model: a causal language model, with or without an adapter.
        examples: what :func:`encode` gave.
        tokenizer: of the model.
        rows: long ``[n]``, the adapter's row for each example; -1: none. None: the model has no adapter.
    """
    collate: Any = DataCollatorForTokenClassification(tokenizer)
    device = next(model.parameters()).device
    nats, tokens = torch.zeros(len(examples)), torch.zeros(len(examples))
    for some in by_length(examples):
        features = [{**inputs_of(examples[place]), "labels": examples[place]["labels"]} for place in some]
        batch = {name: part.to(device) for name, part in collate(features).items()}
        labels = batch.pop("labels")[:, 1:]
        if rows is not None:
            batch["adapter_names"] = rows[some].to(device)
        logits = model(**batch).logits[:, :-1].float()
        found = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
        places = torch.tensor(some)
        nats[places] = found.sum(1).cpu()
        tokens[places] = (labels != IGNORED).sum(1).float().cpu()
    return TokenLosses(nats, tokens)
