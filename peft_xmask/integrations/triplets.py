"""Profiles of an embedding model: what is similar, for one person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError

COLUMNS = ("anchor", "positive", "negative")
"""The columns of a triplet."""


class TripletModel(nn.Module):
    """A sentence-transformers model as :func:`~peft_xmask.train_profiles` trains it: on triplets, for each profile.

    ``loss = mean_b softplus(-scale (cos(e(a_b), e(p_b)) - cos(e(a_b), e(n_b))))``

    Each triplet is judged by the embeddings e of its own profile. This is the loss of sentence-transformers'
    ``MultipleNegativesRankingLoss`` with the triplet's own negative as the only one, because another person's texts are
    embedded by another adapter.

    Pass :attr:`collate` as ``data_collator``, :meth:`losses` as ``example_loss``, and ``head="frozen"``. The examples
    have columns ``anchor``, ``positive`` and ``negative`` with texts, and that of the profiles.

    Args:
        embedder: a ``SentenceTransformer``. It is not copied: training adapts it in place.
        scale: of the difference of cosines.

    Raises:
        ConfigError: ``scale`` is not above 0.
    """

    def __init__(self, embedder: nn.Module, scale: float = 20.0) -> None:
        if not scale > 0:
            raise ConfigError(f"scale={scale!r} is invalid: expected a number above 0.")
        super().__init__()
        self.embedder, self.scale = embedder, scale
        inner = getattr(embedder, "transformers_model", None)
        self.config = getattr(inner, "config", None)  # names the architecture and the base, for PEFT
        self.name_or_path = getattr(inner, "name_or_path", None)

    def embed(self, texts: Tensor) -> Tensor:
        """Embeddings of length 1.

        Args:
            texts: long ``[B, 2, T]``, token ids and the attention mask.

        Shapes:
            returns ``[B, d]``
        """
        features = {"input_ids": texts[:, 0], "attention_mask": texts[:, 1]}
        return F.normalize(self.embedder(features)["sentence_embedding"], dim=-1)

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> dict[str, Tensor]:
        """The loss of a batch, and the difference of the cosines of each triplet, ``[B]``, as ``margin``."""
        start = self.embed(anchor)
        margin = (start * self.embed(positive)).sum(-1) - (start * self.embed(negative)).sum(-1)
        return {"loss": F.softplus(-self.scale * margin).mean(), "margin": margin}

    def losses(self, outputs: dict[str, Tensor], batch: Any) -> Tensor:
        """The loss of each triplet, ``[B]``."""
        return F.softplus(-self.scale * outputs["margin"].float())

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Tokenised texts of a batch: long ``[B, 2, T]`` for each column.

        Raises:
            ConfigError: an example lacks a column.
        """
        missing = [column for column in COLUMNS if any(column not in example for example in examples)]
        if missing:
            raise ConfigError(
                f"Expected texts in the columns {', '.join(COLUMNS)} of each example, found none in "
                f"{', '.join(missing)}."
            )
        return {column: self._tokens([str(example[column]) for example in examples]) for column in COLUMNS}

    def _tokens(self, texts: list[str]) -> Tensor:
        features = self.embedder.preprocess(texts)  # type: ignore[operator]
        return torch.stack([features["input_ids"], features["attention_mask"]], 1)
