"""Config fields of adapters that read activations."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...core.adapter import ACTIVATIONS, INSERTION_FORMS, AdapterForm
from ..base.config import TargetConfig, require_choice


@dataclass
class SiteConfig(TargetConfig):
    """Where adapters sit and what they look like there.

    Args:
        activation: between down- and up-projection: one of ``peft_xmask.core.adapter.ACTIVATIONS``. With ``"identity"``
            (and no ``layer_norm``) the adapter is linear and can be merged.
        layer_norm: whether a LayerNorm of the bottleneck's width, without weights, stands before the activation.
        insertion_form: ``"sequential"`` (reads the module's output) or ``"parallel"`` (reads its input).
        target_modules: names or a regular expression of the linear modules to adapt, or ``"all-linear"``. None: the
            sites of a trained pool, else the feed-forward output projection of each block, for the architectures in
            ``peft_xmask.tuners.base.targets.FFN_OUTPUT``.

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

    def card_form(self) -> str:
        """Activation and place."""
        return f": {self.activation}, {self.insertion_form}"
