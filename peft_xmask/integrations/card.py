"""The model card of an adapter: how to load it, what it belongs to and how many bytes it takes.

PEFT writes a generic ``README.md`` before an adapter's files; :meth:`peft_xmask.config.SiteConfig.save_pretrained`, which
PEFT calls after them, completes it here. Two of PEFT's methods write a card when the files are there already, for the
Trainer and for ``push_to_hub``: :func:`complete_cards_of_peft` wraps them.
"""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import is_jinja_available, validate_repo_id
from peft import PeftModel

from ..config import SiteConfig
from ..errors import PeftXMaskWarning
from ..files import write_text
from ..pool import AdapterPool
from ..pool.folders import Folder, HubPath
from ..pool.storage import JSON_FILE, stored_bytes
from ..size import ADAPTER_FILE, CONFIG_FILE, folder_size

CARD_FILE = "README.md"
BEGIN = "```python\nimport peft_xmask"
END = "<!-- peft_xmask writes anew, at each save, what is between the Python block and this line; add yours below. -->"

AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_GENERATED = re.compile(r"- PEFT \S+|### Framework versions|.*model card has been automatically generated\.")
_CLASSIFIER = re.compile(r"(^|\.)(classifier|score|out_proj)\.weight$")


def complete_card(folder: Path, config: SiteConfig, adapter_id: str | None = None) -> None:
    """Bring the model card of an adapter folder up to date; do nothing where an adapter file or a card is missing.

    After the metadata come how to load the adapter, what it is and its sizes. An untouched template of PEFT or
    transformers is dropped. What a user wrote stays. Saving never fails for the card's sake: what goes wrong is a
    :class:`~peft_xmask.PeftXMaskWarning`, and the card is then left as it was.

    Args:
        folder: with ``adapter_model.safetensors``, ``adapter_config.json`` and ``README.md``.
        config: of the adapter.
        adapter_id: under which others will find it; None: not known.
    """
    path = folder / CARD_FILE
    if not (path.is_file() and (folder / ADAPTER_FILE).is_file() and (folder / CONFIG_FILE).is_file()):
        return
    try:
        card = ModelCard(path.read_text(encoding="utf-8-sig"))
        section = "\n".join([*_how_to_load(folder, config, adapter_id), "", *_facts(folder, config), "", END])
        _complete_metadata(card.data, config)
        card.text = _with_section(card.text, section)
        write_text(path, str(card))
    except Exception as error:  # a card is worth less than the adapter that is being saved
        warnings.warn(
            f"The adapter is saved; its model card '{path}' could not be completed: {error}",
            PeftXMaskWarning,
            stacklevel=3,
        )


def complete_cards_of_peft() -> None:
    """Let PEFT's models complete the cards that they write after an adapter's files. Doing it twice is harmless.

    ``push_to_hub`` replaces the card of the folder it uploads by transformers' own, and the Trainer's card of a finished
    training replaces the folder's. Models whose adapters are all of other methods are not concerned.
    """
    _extend("create_or_update_model_card", lambda model, folder: _complete_default(model, folder, None))
    _extend("_upload_modified_files", _complete_default, before=True)


def _extend(name: str, complete: Callable[..., None], before: bool = False) -> None:
    original = getattr(PeftModel, name, None)
    if original is None or hasattr(original, "completes_cards"):
        return

    @functools.wraps(original)
    def extended(self: PeftModel, folder: str, *args: Any, **kwargs: Any) -> Any:
        if before:
            complete(self, folder, *args[:1], **{key: kwargs[key] for key in ("repo_id",) if key in kwargs})
        result = original(self, folder, *args, **kwargs)
        if not before:
            complete(self, folder)
        return result

    extended.completes_cards = True  # type: ignore[attr-defined]
    setattr(PeftModel, name, extended)


def _complete_default(model: PeftModel, folder: str, repo_id: str | None) -> None:
    config = model.peft_config.get("default")
    if isinstance(config, SiteConfig):
        complete_card(Path(folder), config, repo_id)
