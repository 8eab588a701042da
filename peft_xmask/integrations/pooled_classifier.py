"""Classifiers over a backbone, found by transformers' Auto classes and pipelines through their own ``config.json``.

Sentence encoders such as MiniLM are trained to be mean-pooled. The pooler that a sequence classification model would
use is not trained in them at all, and a frozen base gives a small adapter no way to repair it. So the head reads the
mean of the last hidden states, and everything that loads an adapter has to know that: the adapter's folder says so.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from ..errors import ConfigError, FileFormatError
from ..tuners.base.classifier import CONFIG_FILE, MODEL_TYPE, POOLINGS, Classifier


class PooledClassifierConfig(PreTrainedConfig):
    """The ``config.json`` of a classifier: pooling, label names and backbone.

    Args:
        pooling: ``"mean"``, or ``"model"`` for the architecture's own sequence classification model.
        text_length: tokens after which texts were cut in training; tokenizers loaded from the folder cut there.
        backbone_config: of the backbone, where its weights are saved beside this file. None: the base that the adapter
            in the same folder names.
        kwargs: of any config: ``id2label``, ``label2id``, ``problem_type`` and so on.

    Raises:
        ConfigError: an unknown pooling.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        pooling: str = "mean",
        text_length: int | None = None,
        backbone_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if pooling not in POOLINGS:
            raise ConfigError(f"pooling={pooling!r} is unknown: expected one of {', '.join(POOLINGS)}.")
        self.pooling = pooling
        self.text_length = text_length
        self.backbone_config = backbone_config
        super().__init__(**kwargs)

    @classmethod
    def of(cls, classifier: Classifier) -> PooledClassifierConfig:
        """The config of an adapter's classifier."""
        return cls(**classifier.config_fields())

    def apply_to(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """A copy of a backbone's config, with this one's labels."""
        found: Any = copy.deepcopy(config)
        found.id2label, found.label2id = copy.copy(self.id2label), copy.copy(self.label2id)
        found.problem_type = self.problem_type
        named: PreTrainedConfig = found
        return named


class MeanPooledClassifier(PreTrainedModel):
    """Classify texts from mean-pooled hidden states.

    ``logits = W mean_t(h_t) + b``, the mean taken over the tokens that are not padding.

    It is a transformers model, so ``get_peft_model(..., task_type="SEQ_CLS")`` trains and saves ``classifier`` beside
    any adapter, and Trainer and gradient checkpointing work as usual. It shares the backbone; it does not copy it. Its
    config in memory is the backbone's, with ``head_pooling="mean"``, so that every default by architecture applies.

    Args:
        backbone: any model of ``AutoModel`` whose first output is the last hidden state ``[B, T, d]``; or a config with
            ``backbone_config``, from which one is made.
        num_labels: number of classes; 1 with ``problem_type="regression"``. None: as the config says.

    Raises:
        ValueError: fewer than two classes.
    """

    config_class = PooledClassifierConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, backbone: PreTrainedModel | PooledClassifierConfig, num_labels: int | None = None) -> None:
        named: PooledClassifierConfig | None = None
        if isinstance(backbone, PooledClassifierConfig):
            named, backbone = backbone, AutoModel.from_config(_backbone_config(backbone))
        config: Any = copy.deepcopy(backbone.config) if named is None else named.apply_to(backbone.config)
        if num_labels is not None:
            config.num_labels = num_labels
        if config.num_labels < 2 and config.problem_type != "regression" and named is None:
            raise ValueError(f"Expected num_labels of at least 2, found {config.num_labels}.")
        config.head_pooling = "mean"
        super().__init__(config)
        self.backbone: Any = backbone
        self.classifier = nn.Linear(config.get_text_config().hidden_size, config.num_labels)
        self.classifier.to(next(backbone.parameters()))
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a classifier from any supported source.

        Args:
            pretrained_model_name_or_path: a folder that :meth:`save_pretrained` wrote; a folder with an adapter and its
                ``config.json``, which is then loaded onto the base that the adapter names; or any base model, which
                gets a new head (pass ``num_labels``, or ``config``).
            args: of ``from_pretrained``.
            kwargs: of ``from_pretrained``.

        Returns:
            A classifier; with ``pooling="model"`` in the config, the architecture's own.

        Raises:
            FileFormatError: an adapter that does not name its base.
        """
        where, config = pretrained_model_name_or_path, kwargs.get("config")
        if config is None and (Path(where) / CONFIG_FILE).is_file():
            config = AutoConfig.from_pretrained(where)
        if isinstance(config, PooledClassifierConfig) and config.backbone_config:
            return super().from_pretrained(where, *args, **{**kwargs, "config": config})
        kwargs.pop("config", None)
        adapter = dict(kwargs.pop("adapter_kwargs", None) or {})
        path = adapter.pop("_adapter_model_path", None)
        if (Path(where) / "adapter_config.json").is_file():
            path, where = path or where, _base_of(where)
        if not isinstance(config, PooledClassifierConfig):
            config = PooledClassifierConfig(num_labels=kwargs.pop("num_labels", 2))
        model = load_classifier(where, config, **kwargs)
        if path is not None:
            model.load_adapter(str(path), adapter_kwargs={key: value for key, value in adapter.items() if value})
        return model.eval()

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write weights and a config that the Auto classes read, as any model of transformers does."""
        super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory) / CONFIG_FILE
        if path.is_file():
            backbone = {**self.backbone.config.to_dict(), "model_type": self.backbone.config.model_type}
            config = PooledClassifierConfig(
                backbone_config=backbone,
                id2label=self.config.id2label,
                label2id=self.config.label2id,
                problem_type=self.config.problem_type,
                architectures=[type(self).__name__],
                dtype=str(self.dtype).removeprefix("torch."),
            )
            config.save_pretrained(save_directory)

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
        """Compute logits ``[B, num_labels]`` and, with ``labels``, the mean loss.

        The loss is the cross-entropy in nats for ``labels [B]``, or what ``config.problem_type`` says: the mean squared
        error for ``"regression"``, the binary cross-entropy for ``"multi_label_classification"``.

        Args:
            input_ids: ``[B, T]``; either this or ``inputs_embeds [B, T, d]``.
            attention_mask: ``[B, T]``, 1 for tokens and 0 for padding; None means no padding.
            token_type_ids: ``[B, T]``, for encoders that have them.
            inputs_embeds: ``[B, T, d]``.
            labels: ``[B]`` class numbers or values; ``[B, num_labels]`` for several labels at once.
            kwargs: handed to the backbone.
        """
        if token_type_ids is not None:
            kwargs["token_type_ids"] = token_type_ids
        kwargs.pop("return_dict", None)
        outputs = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, return_dict=True, **kwargs
        )
        logits = self.classifier(mean_pool(outputs.last_hidden_state, attention_mask))
        loss: Any = None if labels is None else _loss(logits.float(), labels, self.config.problem_type)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class _BaseTokenizer(PreTrainedTokenizerFast):
    """Loads the tokenizer of the base that an adapter names, since profiles do not store copies of it."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """The base's tokenizer, cutting texts where they were cut in training."""
        where = pretrained_model_name_or_path
        config: Any = kwargs.pop("config", None) or AutoConfig.from_pretrained(where)
        tokenizer = AutoTokenizer.from_pretrained(_base_of(where), *args, **kwargs)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if getattr(config, "text_length", None) is not None:
            tokenizer.model_max_length = config.text_length
        return tokenizer


def load_classifier(base: str | os.PathLike[str], config: PooledClassifierConfig, **kwargs: Any) -> PreTrainedModel:
    """The base with a new head, pooling and label names as the config says. Arguments are those of ``from_pretrained``.

    Raises:
        OSError: the base cannot be found.
    """
    model: PreTrainedModel
    if config.pooling == "model":
        own = config.apply_to(AutoConfig.from_pretrained(base))
        model = AutoModelForSequenceClassification.from_pretrained(base, config=own, **kwargs)
        return model
    backbone = AutoModel.from_pretrained(base, **kwargs)
    backbone.config = config.apply_to(backbone.config)
    return MeanPooledClassifier(backbone)


def load_tokenizer(base: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """A tokenizer that can pad."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_classifier(folder: str | os.PathLike[str]) -> Classifier:
    """Pooling and label names of the adapter or bank in a folder, from its ``config.json``.

    Raises:
        FileFormatError: there is no such file, or it is damaged or of another kind.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise FileFormatError(
            f"Expected '{path}' with the label names and the pooling of the head, found none. `peft-xmask train` "
            "writes it, and so does save_pretrained for a model whose config has label names (id2label)."
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.get("model_type") != MODEL_TYPE:
            raise ValueError(f"Expected model_type '{MODEL_TYPE}', found {fields.get('model_type')!r}")
        numbers = sorted(fields["id2label"], key=int)
        labels = tuple(fields["id2label"][number] for number in numbers)
        return Classifier(labels, fields["pooling"], fields.get("text_length"), fields.get("problem_type"))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FileFormatError(f"'{path}' is damaged: {error}. Train again, or restore the file.") from error


def mean_pool(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Mean over the tokens that are not padding: ``[B, T, d]``, mask ``[B, T]`` or None -> ``[B, d]``."""
    if attention_mask is None:
        return hidden.mean(1)
    weights = attention_mask.to(hidden.dtype).unsqueeze(-1)
    return torch.sum(hidden * weights, 1) / weights.sum(1).clamp_min(1)


def register() -> None:
    """Register the classifier with transformers' Auto classes. Calling this twice is harmless."""
    AutoConfig.register(PooledClassifierConfig.model_type, PooledClassifierConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(PooledClassifierConfig, MeanPooledClassifier, exist_ok=True)
    AutoTokenizer.register(PooledClassifierConfig, fast_tokenizer_class=_BaseTokenizer, exist_ok=True)


def _backbone_config(config: PooledClassifierConfig) -> PreTrainedConfig:
    if not config.backbone_config:
        raise FileFormatError(
            "Expected a config with the backbone's own, found none. The weights of an adapter's base are not in its "
            "folder: load it with from_pretrained."
        )
    fields = dict(config.backbone_config)
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def _base_of(adapter: str | os.PathLike[str]) -> str:
    base = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    if not base:
        raise FileFormatError(f"'{adapter}' does not name its base model. Pass it (`--base` on the command line).")
    return str(base)


def _loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    if problem_type == "regression":
        return nn.functional.mse_loss(logits.squeeze(-1), labels.float().view(-1))
    if problem_type == "multi_label_classification":
        return nn.functional.binary_cross_entropy_with_logits(logits, labels.float())
    return nn.functional.cross_entropy(logits, labels)
