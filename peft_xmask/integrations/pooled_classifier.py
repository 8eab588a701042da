"""A classification head for sentence encoders: the mean of the last hidden states, then one linear layer.

Encoders such as MiniLM are trained to be mean-pooled; the pooler that a sequence classification model would use is not
trained in them at all, and a frozen base gives a small adapter no way to repair it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanPooledClassifier(PreTrainedModel):
    """Classify texts from mean-pooled hidden states.

    ``logits = W mean_t(h_t) + b``, the mean taken over the tokens that are not padding.

    It is a transformers model, so ``get_peft_model(..., task_type="SEQ_CLS")`` trains and saves ``classifier`` beside
    any adapter, and Trainer and gradient checkpointing work as usual. It shares the backbone; it does not copy it.

    Args:
        backbone: any model of ``AutoModel`` whose first output is the last hidden state ``[B, T, d]``.
        num_labels: number of classes.

    Raises:
        ValueError: fewer than two classes.
    """

    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, backbone: PreTrainedModel, num_labels: int) -> None:
        if num_labels < 2:
            raise ValueError(f"Expected num_labels of at least 2, found {num_labels}.")
        config = copy.deepcopy(backbone.config)
        config.num_labels = num_labels
        super().__init__(config)
        self.backbone = backbone
        self.classifier = nn.Linear(config.get_text_config().hidden_size, num_labels)
        self.classifier.to(device=backbone.device, dtype=backbone.dtype)
        self.post_init()

    def init_weights(self) -> None:
        """Do nothing: the backbone arrives with its weights and the head has PyTorch's initial ones."""

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's token embedding."""
        embeddings: nn.Module = self.backbone.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the backbone's token embedding."""
        self.backbone.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Compute logits ``[B, num_labels]`` and, with ``labels [B]``, the mean cross-entropy in nats.

        Args:
            input_ids: ``[B, T]``; either this or ``inputs_embeds [B, T, d]``.
            attention_mask: ``[B, T]``, 1 for tokens and 0 for padding; None means no padding.
            token_type_ids: ``[B, T]``, for encoders that have them.
            inputs_embeds: ``[B, T, d]``.
            labels: ``[B]`` class numbers.
            kwargs: handed to the backbone.
        """
        if token_type_ids is not None:
            kwargs["token_type_ids"] = token_type_ids
        kwargs.pop("return_dict", None)
        outputs = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, return_dict=True, **kwargs
        )
        logits = self.classifier(mean_pool(outputs.last_hidden_state, attention_mask))
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def mean_pool(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Mean over the tokens that are not padding: ``[B, T, d]``, mask ``[B, T]`` or None -> ``[B, d]``."""
    if attention_mask is None:
        return hidden.mean(1)
    weights = attention_mask.to(hidden.dtype).unsqueeze(-1)
    return torch.sum(hidden * weights, 1) / weights.sum(1).clamp_min(1)
