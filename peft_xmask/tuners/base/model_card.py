"""The model card of an adapter: how to load it, what it belongs to and how many bytes it takes.

PEFT writes a generic ``README.md`` before an adapter's files and calls our config's ``save_pretrained`` last, which
completes the card. Two methods of PEFT's models write a card when the files are there already, for the Trainer and for
``push_to_hub``. :func:`complete_cards_of_peft` sees to all three.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import safetensors
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from peft import PeftConfig, PeftModel

from ..._version import __version__
from ...core.adapter_folder import ADAPTER_FILE, CONFIG_FILE, NAMES_PREFIX, folder_size
from ...core.files import write_text
from ...core.hub import Folder, HubPath, hub_id, shown_name
from ...errors import PeftXMaskWarning
from ...pool.storage import JSON_FILE, stored_bytes
from .classifier import CONFIG_FILE as MODEL_CONFIG
from .classifier import Classifier
from .config import AFTER_SAVING, CardPool, TargetConfig

CARD_FILE = "README.md"
BEGIN = "```python\nimport peft_xmask\n"
END = "<!-- peft_xmask replaces what is between the Python block and this line at each save. The rest is yours. -->"

AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
TAGS = {
    "XPEFT": "x-peft",
    "BOTTLENECK_ADAPTER": "bottleneck-adapter",
    "MAGNITUDE_MASK": "magnitude-mask",
    "WEIGHT_ADAPTER": "weight-adapter",
}
_LABELLED = ("SEQ_CLS", "TOKEN_CLS")
_HEAD = re.compile(r"(^|\.)(classifier|score|classifier\.out_proj)\.weight$")
_ADAPTER = "path-or-hub-id-of-this-adapter"
_EMPTY = "---\nlibrary_name: peft\n---\n"
_GENERATED = re.compile(r"\s*|### Framework versions|- PEFT \S+|.*model card has been automatically generated\.")


def complete_card(folder: Path, config: TargetConfig, adapter_id: str | None = None) -> None:
    """Bring the model card of an adapter folder up to date, or write it; nothing where there is no adapter.

    After the metadata come how to load the adapter, what it is and its sizes. What a user wrote stays; an untouched
    template of PEFT or transformers goes. Saving never fails for the card's sake: what goes wrong is a
    :class:`~peft_xmask.PeftXMaskWarning`, and the card is then left as it was.

    Beside the card it writes ``config.json`` where a classification head pools or has label names that its loader must
    know: transformers' Auto classes and pipelines read that file.

    Args:
        folder: with ``adapter_model.safetensors`` and ``adapter_config.json``.
        config: of the adapter.
        adapter_id: under which others will find it; None: not known.
    """
    if not all((folder / name).is_file() for name in (ADAPTER_FILE, CONFIG_FILE)):
        return
    head = None if config.classifier is None else Classifier.from_fields(config.classifier)
    if head is not None and (head.pooling != "model" or head.has_names):
        head.write_config(folder)
    _complete(folder, config, [*_how_to_load(folder, config, adapter_id), "", *_table(folder, config)])


def complete_plain_card(folder: Path, config: PeftConfig) -> None:
    """Put how to load it first on the card of an adapter of PEFT's own methods, which has a ``config.json`` beside it.

    Raises:
        OSError: the folder cannot be written to.
    """
    _complete(folder, config, _how_to_load_a_classifier(folder, config, None, []))


def _complete(folder: Path, config: PeftConfig, section: list[str]) -> None:
    path = folder / CARD_FILE
    try:
        card = ModelCard(path.read_text(encoding="utf-8-sig") if path.is_file() else _EMPTY)
        _complete_metadata(card.data, config)
        card.text = _with_section(card.text, "\n".join([*section, "", END]))
        write_text(path, str(card))
    except Exception as error:  # a card is worth less than the adapter that is being saved
        warnings.warn(
            f"The adapter is saved, but its model card '{path}' could not be completed: {error}",
            PeftXMaskWarning,
            stacklevel=4,
        )


def complete_cards_of_peft() -> None:
    """Complete the card after each save of a config of ours, and wherever PEFT writes one later.

    Calling this twice is harmless.

    ``push_to_hub`` replaces the card in the folder that it uploads by transformers' own, and the Trainer replaces it at
    the end of a training. Models whose adapter is of another method are not concerned.
    """
    if complete_card not in AFTER_SAVING:
        AFTER_SAVING.append(complete_card)
    for name, extend in (
        ("create_or_update_model_card", _completing_after),
        ("_upload_modified_files", _completing_before),
    ):
        method = getattr(PeftModel, name, None)
        if method is not None and not hasattr(method, "completes_cards"):
            extended = extend(method)
            extended.completes_cards = True
            setattr(PeftModel, name, extended)


def _completing_after(create: Any) -> Any:
    @functools.wraps(create)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        create(self, output_dir)
        _complete_default(self, output_dir, None)

    return create_or_update_model_card


def _completing_before(upload: Any) -> Any:
    @functools.wraps(upload)
    def upload_modified_files(self: PeftModel, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        _complete_default(self, working_dir, repo_id)
        return upload(self, working_dir, repo_id, *args, **kwargs)

    return upload_modified_files


def _complete_default(model: PeftModel, folder: str, adapter_id: str | None) -> None:
    """Only the adapter called "default" lies beside PEFT's card; others have folders, and cards, of their own."""
    config = model.peft_config.get("default")
    if isinstance(config, TargetConfig):
        complete_card(Path(folder), config, adapter_id)


def _with_section(text: str, section: str) -> str:
    """The body of a card with our section replaced, or inserted first."""
    before, end, after = text.partition(END)
    if not end:
        before, after = "", text
    elif BEGIN in before:
        before = before[: before.rindex(BEGIN)]
    parts = [part.strip() for part in (before, section, after) if part is section or not _is_untouched(part)]
    return "\n" + "\n\n".join(parts) + "\n"


def _is_untouched(text: str) -> bool:
    """Whether nobody has written into the template."""
    return all(line.strip() in _template_lines() or _GENERATED.fullmatch(line) for line in text.splitlines())


@functools.lru_cache(maxsize=1)
def _template_lines() -> frozenset[str]:
    if importlib.util.find_spec("jinja2") is None:
        return frozenset()
    return frozenset(line.strip() for line in ModelCard.from_template(ModelCardData()).text.splitlines())


def _complete_metadata(data: Any, config: PeftConfig) -> None:
    """Set the library, method and base model; the Hub refuses a card whose base model is a folder of this machine."""
    data["library_name"] = "peft"
    bases = [data.base_model] if isinstance(data.base_model, str) else data.base_model or []
    known = [base for base in bases if hub_id(base)] or [hub_id(config.base_model_name_or_path)]
    data["base_model"] = known[0] if len(known) == 1 else known
    prefix = "base_model:adapter:"
    kept = [tag for tag in data.tags or [] if not tag.startswith(prefix) or hub_id(tag.removeprefix(prefix))]
    data["tags"] = sorted({*kept, "peft", TAGS.get(_method(config), _method(config).lower())})


def _how_to_load(folder: Path, config: TargetConfig, adapter_id: str | None) -> list[str]:
    pool = config.card_pool()
    replace_pool: list[str] = []
    if pool is not None and pool.needed and not _pool_place(pool):
        replace_pool = ["peft_config = peft_xmask.XPEFTConfig.from_pretrained(adapter)"]
        replace_pool += ['peft_config.pool = "path-or-hub-id-of-the-pool"']
    if (folder / MODEL_CONFIG).is_file() and config.classifier is not None:
        return _how_to_load_a_classifier(folder, config, adapter_id, replace_pool)
    facts = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    found = facts.get("auto_mapping") or {}
    in_transformers = str(found.get("parent_library", "transformers")).startswith("transformers")
    auto = AUTO_CLASSES.get(facts.get("task_type") or "") or found.get("base_model_class")
    lines = [*BEGIN.splitlines(), "from peft import PeftModel"]
    base = hub_id(config.base_model_name_or_path) or "path-or-hub-id-of-the-base-model"
    place = f'adapter = "{adapter_id or _ADAPTER}"'
    if auto and in_transformers:
        labels = _number_of_labels(folder, facts)
        lines += [f"from transformers import {auto}", "", place]
        lines += [f'base_model = {auto}.from_pretrained("{base}"{f", num_labels={labels}" if labels else ""})']
    else:
        lines += ["", place]
        lines += [f"base_model = ...  # {found.get('base_model_class', 'the base model')}, as it was adapted"]
    return [*lines, *replace_pool, _load_onto("base_model", replace_pool), "```"]


def _how_to_load_a_classifier(
    folder: Path, config: PeftConfig, adapter_id: str | None, replace_pool: list[str]
) -> list[str]:
    """Code that answers with label names; what it does not know it reads from the adapter's files."""
    with safetensors.safe_open(str(folder / ADAPTER_FILE), framework="pt") as tensors:
        keys: list[str] = tensors.keys()
        is_bank = any(key.startswith(NAMES_PREFIX) for key in keys)
    base = hub_id(config.base_model_name_or_path)
    lines = [*BEGIN.splitlines(), f"from peft import {'' if base else 'PeftConfig, '}PeftModel"]
    if is_bank:
        lines = [*BEGIN.splitlines(), *([] if base else ["from peft import PeftConfig"])]
    lines += ["from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer", ""]
    lines += [f'adapter = "{adapter_id or _ADAPTER}"']
    lines += [f'base = "{base}"' if base else "base = PeftConfig.from_pretrained(adapter).base_model_name_or_path"]
    lines += ["config = AutoConfig.from_pretrained(adapter)  # pooling and label names"]
    lines += ["base_model = AutoModelForSequenceClassification.from_pretrained(base, config=config)"]
    if is_bank:
        lines += ["bank = peft_xmask.ProfileBank.from_pretrained(adapter)", "model = bank.attach(base_model)"]
    else:
        lines += [*replace_pool, _load_onto("base_model", replace_pool)]
    length = json.loads((folder / MODEL_CONFIG).read_text(encoding="utf-8")).get("text_length")
    lines += ["", "tokenizer = AutoTokenizer.from_pretrained(base)"]
    cut = f"truncation=True, max_length={length}" if length else "truncation=True"
    lines += [f'batch = tokenizer(["A text to classify."], padding=True, {cut}, return_tensors="pt")']
    chosen = ", adapter_names=[next(iter(bank))]" if is_bank else ""
    lines += [f"logits = model.eval()(**batch{chosen}).logits"]
    return [*lines, "print([model.config.id2label[number] for number in logits.argmax(-1).tolist()])", "```"]


def _load_onto(base_model: str, replaced: list[str]) -> str:
    return f"model = PeftModel.from_pretrained({base_model}, adapter{', config=peft_config' if replaced else ''})"


def _number_of_labels(folder: Path, facts: dict[str, Any]) -> int | None:
    """Rows of the classification head in the file, if there is one such head."""
    if facts.get("task_type") not in _LABELLED:
        return None
    with safetensors.safe_open(str(folder / ADAPTER_FILE), framework="pt") as tensors:
        names: list[str] = tensors.keys()
        rows: list[int] = [tensors.get_slice(name).get_shape()[0] for name in names if _HEAD.search(name)]
    return rows[0] if len(rows) == 1 else None


def _table(folder: Path, config: TargetConfig) -> list[str]:
    size = folder_size(folder)
    rows: list[tuple[str, object]] = [
        ("method", _method(config) + config.card_form()),
        ("base model", shown_name(config.base_model_name_or_path)),
        ("base fingerprint", f"`{config.base_fingerprint}`"),
    ]
    rows += config.card_facts()
    rows += [
        (config.card_payload, _bytes(size.payload_bytes)),
        ("modules saved whole, such as a head", _bytes(size.head_bytes)),
        (f"file `{ADAPTER_FILE}`", _bytes(size.file_bytes)),
    ]
    if (pool := config.card_pool()) is not None:
        rows.append(("pool, once for all profiles", _bytes(_pool_bytes(pool))))
    rows.append(("trained", _training(config.training)))
    rows.append(("made with", f"peft_xmask {__version__}, PEFT {peft.__version__}"))
    return ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]


def _method(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _training(facts: dict[str, Any] | None) -> str:
    """How it was trained, in a line."""
    if facts is None:
        return "not recorded. Add `peft_xmask.RecordCallback` to the Trainer to record it."
    said = dict(facts)
    counts = [(said.pop(name, None), unit) for name, unit in (("steps", "steps"), ("epochs", "epochs"))]
    parts = [f"{count:,} {unit}" for count, unit in counts if count is not None]
    if (size := said.pop("batch_size", None)) is not None:
        parts.append(f"{size:,} examples a step")
    return ", ".join([*parts, *(f"{name.replace('_', ' ')} {_number(value)}" for name, value in said.items())])


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _bytes(number: int | None) -> str:
    return "not known" if number is None else f"{number:,} bytes"


def _pool_place(pool: CardPool) -> HubPath | None:
    return HubPath.parse(pool.name) if pool.name and hub_id(pool.name) else None


def _pool_bytes(pool: CardPool) -> int | None:
    """Of its tensors; else from ``pool.json``, here or in the Hub's cache; None where neither has it.

    Nothing is fetched.
    """
    if pool.nbytes is not None or pool.name is None:
        return pool.nbytes
    folder = Path(pool.name)
    if place := _pool_place(pool):
        inside = f"{place.subfolder}/{JSON_FILE}" if place.subfolder else JSON_FILE
        cached = try_to_load_from_cache(place.repo_id, inside, revision=place.revision)
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    return stored_bytes(Folder(folder, folder.name).read_json(JSON_FILE)) if (folder / JSON_FILE).is_file() else None
