"""A bank as a pipeline of transformers, for code that already uses ``pipeline("text-classification", ...)``."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import TextClassificationPipeline

from ..bank.bank import ProfileBank
from ..bank.names import NameIndex
from ..errors import ConfigError
from ..integrations.pooled_classifier import PooledClassifierConfig, load_classifier, load_tokenizer
from .predictor import MAX_LENGTH, head_of


class PeoplePipeline(TextClassificationPipeline):
    """Text classification as each person would do it; made by :func:`people_pipeline`.

    Besides texts it takes ``{"text": ..., "who": ...}``, so that a batch may mix people, and ``who=`` for all texts of
    a call. Whoever has no profile, and nobody, is answered by the part that all people share. Everything else is as in
    transformers: ``top_k=None`` for the scores of all labels, ``batch_size=``, generators, datasets. A regression gives
    its value as the score.
    """

    people: NameIndex

    def _sanitize_parameters(self, *, who: str | None = None, **kwargs: Any) -> tuple[dict[str, Any], Any, Any]:  # type: ignore[override]  # always by name
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if who is not None:
            if not isinstance(who, str):
                raise ConfigError(f"Expected one name as who=, found {who!r:.60}. Pass {{'text': ..., 'who': ...}}.")
            preprocess["who"] = who
        return preprocess, forward, postprocess

    def preprocess(self, input_: Any, *, who: str | None = None, **kwargs: Any) -> Any:  # type: ignore[override]  # by name
        """Tokenise a text, and find the row of its person."""
        if isinstance(input_, dict):
            unknown = sorted(input_.keys() - {"text", "who"})
            if unknown or not isinstance(input_.get("text"), str):
                raise ConfigError(f"Expected {{'text': ..., 'who': ...}}, found {input_!r:.80}.")
            who, input_ = input_.get("who", who), input_["text"]
        found: Any = super().preprocess(input_, truncation=True, **kwargs)
        row = None if who is None else self.people.find(who)
        found["adapter_names"] = torch.tensor([-1 if row is None else row])
        return found

    def _forward(self, model_inputs: Any) -> Any:  # type: ignore[override]  # as its parent class has it
        return self.model(**model_inputs)


def people_pipeline(
    where: str | os.PathLike[str] | ProfileBank, base: str | os.PathLike[str] | None = None, **kwargs: Any
) -> PeoplePipeline:
    """A pipeline that answers with a bank's profiles.

    >>> ask = people_pipeline("bank")
    >>> ask("Alien (1979). Horror", who="alice")
    >>> ask([{"text": "Alien (1979). Horror", "who": "alice"}, "Heat (1995). Crime"], batch_size=8)

    Args:
        where: a bank, or the folder or Hub id of one.
        base: the base model. None: the one that the bank names.
        kwargs: of the pipeline, such as ``device``.

    Raises:
        ConfigError: a bank without a recorded head, without profiles or without the name of its base.
        OSError: the base cannot be found.
    """
    bank = where if isinstance(where, ProfileBank) else ProfileBank.from_pretrained(where)
    head = head_of(bank)
    name = base or bank.config.base_model_name_or_path
    if not name:
        raise ConfigError("The bank does not name its base model. Pass it as base=.")
    tokenizer = load_tokenizer(name)
    tokenizer.model_max_length = head.max_length or MAX_LENGTH
    model = load_classifier(name, PooledClassifierConfig.of(head))
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    served: Any = bank.attach(model)
    made = PeoplePipeline(model=served, tokenizer=tokenizer, **kwargs)
    made.people = bank.name_index()
    return made
