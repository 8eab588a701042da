"""Config fields that our tuners share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig

from ...core.files import write_folder
from ...errors import ConfigError

AFTER_SAVING: list[Callable[[Path, TargetConfig], None]] = []
"""Called with the folder and the config after each save. The model card enters itself here, since its code needs this
module."""


@dataclass(frozen=True)
class CardPool:
    """What a model card says of a pool.

    Attributes:
        name: folder or Hub id; None: it has none.
        nbytes: of its stored tensors; None: not known here.
        needed: whether loading the adapter needs the pool's files. A random pool is its seed and needs none.
    """

    name: str | None
    nbytes: int | None
    needed: bool


@dataclass
class TargetConfig(PeftConfig):
    """Which modules of a base model are adapted, and which base that was.

    Args:
        target_modules: names or a regular expression of the modules to adapt, or ``"all-linear"``. None: the method's
            default for the architecture.
        target_parameters: names of parameters to adapt, or the ends of their names behind a dot, such as
            ``"mlp.experts.gate_up_proj"``: PEFT's field for parameters that are not a module's ``weight``. Of methods
            that write into parameters alone.
        exclude_modules: names or a regular expression of modules to leave out.
        layers_to_transform: indexes of the blocks to adapt; None: all.
        layers_pattern: name of the list of blocks, if it is not the usual one.
        modules_to_save: modules, such as a classification head, that are trained and saved whole.
        base_fingerprint: of the adapted base weights; recorded when the adapter is made, checked when it is loaded.
        training: how the adapter was trained, if a :class:`~peft_xmask.RecordCallback` took note; shown on its card.
        classifier: pooling and label names of the classification head that is saved with the adapter, see
            :class:`~peft_xmask.tuners.base.classifier.Classifier`; recorded when the adapter is made.

    Raises:
        ConfigError: ``layers_pattern`` without ``layers_to_transform``, or ``target_parameters`` are not names.
    """

    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules to adapt; None: the method's default for the architecture."}
    )
    target_parameters: list[str] | None = field(default=None, metadata={"help": "Parameters to adapt, by name."})
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Block indexes to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of blocks."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole."})
    base_fingerprint: str | None = field(default=None, metadata={"help": "Fingerprint of the adapted base weights."})
    training: dict[str, Any] | None = field(default=None, metadata={"help": "How the adapter was trained."})
    classifier: dict[str, Any] | None = field(default=None, metadata={"help": "Pooling and label names of the head."})

    fits_any_base = False  # not a field: a file does not have it
    """Whether :meth:`allow_any_base` was called."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.target_modules = _as_set(self.target_modules)
        self.exclude_modules = _as_set(self.exclude_modules)
        self.target_parameters = _names(self.target_parameters)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``, and complete the model card if an adapter and PEFT's card are there.

        PEFT calls this last when it saves an adapter, see :mod:`peft_xmask.tuners.base.model_card`.
        """
        with write_folder(Path(save_directory)) as beside:  # PEFT empties the file before it fills it
            super().save_pretrained(str(beside), **kwargs)
        for complete in AFTER_SAVING:
            complete(Path(save_directory), self)

    card_payload: ClassVar[str] = "adapter weights"
    """What a model card calls the method's own tensors."""

    def card_form(self) -> str:
        """What a model card says behind the method's name."""
        return ""

    def card_pool(self) -> CardPool | None:
        """The pool that the adapter needs; None for a method without one."""
        return None

    def card_facts(self) -> list[tuple[str, object]]:
        """What a model card says of the method's own settings: names and values."""
        return []

    def allow_any_base(self) -> None:
        """Forget the base this adapter was made for, to load it on another one on purpose."""
        self.base_fingerprint = None
        self.fits_any_base = True


def require_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse a value that is not among ``choices``.

    Raises:
        ConfigError: names the field, the value and the choices.
    """
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is unknown: expected one of {', '.join(map(repr, choices))}.")


def require_positive(name: str, value: Any) -> None:
    """Refuse a value that is not a whole number of at least 1.

    Raises:
        ConfigError: names the field and the value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={value!r} is invalid: expected a whole number of at least 1.")


def require_number(name: str, value: Any, *, above: float) -> None:
    """Refuse a value that is not a finite number above a bound, which may be minus infinity.

    Raises:
        ConfigError: names the field and the value.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= above:
        bound = f" above {above:g}" if math.isfinite(above) else ""
        raise ConfigError(f"{name}={value!r} is invalid: expected a finite number{bound}.")


def _names(given: Any) -> list[str] | None:
    """Names of parameters; None if there are none."""
    if given is None:
        return None
    if isinstance(given, str) or not all(isinstance(each, str) and each for each in given):
        raise ConfigError(f"target_parameters={given!r} is invalid: expected a list of names of parameters.")
    return sorted(given) or None


def _as_set(names: list[str] | set[str] | str | None) -> set[str] | str | None:
    return set(names) if isinstance(names, (list, tuple)) else names
