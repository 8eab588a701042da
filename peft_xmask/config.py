"""Config fields that our tuners share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig

from .errors import ConfigError
from .functional import ACTIVATIONS
from .layer import INSERTION_FORMS, AdapterForm


@dataclass
class TargetConfig(PeftConfig):
    """Which modules of a base model are adapted, and which base that was.

    Args:
        target_modules: names or a regular expression of the modules to adapt, or ``"all-linear"``. None: the method's
            default for the architecture.
        exclude_modules: names or a regular expression of modules to leave out.
        layers_to_transform: indexes of the blocks to adapt; None: all.
        layers_pattern: name of the list of blocks, if it is not the usual one.
        modules_to_save: modules, such as a classification head, that are trained and saved whole.
        base_fingerprint: of the adapted base weights; recorded when the adapter is made, checked when it is loaded.
        training: how the adapter was trained, if a :class:`~peft_xmask.RecordCallback` took note; shown on its card.

    Raises:
        ConfigError: ``layers_pattern`` without ``layers_to_transform``.
    """

    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules to adapt; None: the method's default for the architecture."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Block indexes to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of blocks."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole."})
    base_fingerprint: str | None = field(default=None, metadata={"help": "Fingerprint of the adapted base weights."})
    training: dict[str, Any] | None = field(default=None, metadata={"help": "How the adapter was trained."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.target_modules = _as_set(self.target_modules)
        self.exclude_modules = _as_set(self.exclude_modules)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        self.expected_base_fingerprint = self.base_fingerprint

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``, and complete the model card if an adapter and PEFT's card are there.

        PEFT calls this last when it saves an adapter, see :mod:`peft_xmask.integrations.card`.
        """
        super().save_pretrained(save_directory, **kwargs)
        from .integrations.card import complete_card  # it stands above the tuners, which stand on this file

        complete_card(Path(save_directory), self)

    def card_facts(self) -> list[tuple[str, object]]:
        """What a model card says of the method's own settings: names and values."""
        return []

    def allow_any_base(self) -> None:
        """Forget the base this adapter was made for, to load it on another one on purpose."""
        self.base_fingerprint = self.expected_base_fingerprint = None


@dataclass
class SiteConfig(TargetConfig):
    """Where adapters sit and what they look like there.

    Args:
        activation: between down- and up-projection: one of ``peft_xmask.functional.ACTIVATIONS``. With ``"identity"``
            (and no ``layer_norm``) the adapter is linear and can be merged.
        layer_norm: whether a LayerNorm of the bottleneck's width, without weights, stands before the activation.
        insertion_form: ``"sequential"`` (reads the module's output) or ``"parallel"`` (reads its input).
        target_modules: names or a regular expression of the linear modules to adapt, or ``"all-linear"``. None: the
            sites of a trained pool, else the feed-forward output projection of each block, for the architectures in
            ``peft_xmask.targets.FFN_OUTPUT``.

    The other fields are those of :class:`TargetConfig`.

    Raises:
        ConfigError: a value that is not one of those above.
    """

    activation: str = field(default="relu", metadata={"help": "Activation between down- and up-projection."})
    layer_norm: bool = field(default=False, metadata={"help": "LayerNorm without weights before the activation."})
    insertion_form: str = field(default="sequential", metadata={"help": "'sequential' or 'parallel'."})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("activation", self.activation, sorted(ACTIVATIONS))
        require_choice("insertion_form", self.insertion_form, INSERTION_FORMS)

    @property
    def form(self) -> AdapterForm:
        """How the adapter is applied."""
        return AdapterForm(self.activation, self.layer_norm, self.insertion_form)


def require_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse a value that is not among ``choices``.

    Raises:
        ConfigError: names the field, the value and the choices.
    """
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is not known. Expected one of: {', '.join(map(repr, choices))}.")


def require_positive(name: str, value: Any) -> None:
    """Refuse a value that is not a whole number of at least 1.

    Raises:
        ConfigError: names the field and the value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={value!r} is not possible. Expected a whole number of at least 1.")


def _as_set(names: list[str] | set[str] | str | None) -> set[str] | str | None:
    return set(names) if isinstance(names, (list, tuple)) else names
