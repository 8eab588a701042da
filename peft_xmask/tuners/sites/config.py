"""Config fields of adapters that read activations."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...core.adapter import ACTIVATIONS, INSERTION_FORMS, AdapterForm
from ...errors import ConfigError
from ..base.config import TargetConfig, require_choice


@dataclass
class SiteConfig(TargetConfig):
    """Where adapters sit and what they look like there.

    Args:
        activation: between down- and up-projection: one of ``peft_xmask.core.adapter.ACTIVATIONS``. With ``"identity"``
            (and no ``layer_norm``) the adapter is linear and can be merged. None: ``"relu"``, or what a pool needs.
        layer_norm: whether a LayerNorm of the bottleneck's width, without weights, precedes the activation. None:
            False, or what a pool needs.
        insertion_form: ``"sequential"`` (reads the module's output) or ``"parallel"`` (reads its input). None:
            ``"sequential"``, or what a pool needs.
        target_modules: names or a regular expression of the modules to adapt, or ``"all-linear"``: linear layers, fused
            experts and, sequentially, convolutions and embeddings. None: the
            sites of a trained pool, else the feed-forward output projection of each block, for the architectures in
            ``peft_xmask.tuners.base.targets.FFN_OUTPUT``.

    The other fields are those of :class:`TargetConfig`.

    Raises:
        ConfigError: a field has an invalid value, or there are ``target_parameters``.
    """

    activation: str | None = field(default=None, metadata={"help": "Activation between down- and up-projection."})
    layer_norm: bool | None = field(default=None, metadata={"help": "LayerNorm without weights before the activation."})
    insertion_form: str | None = field(default=None, metadata={"help": "'sequential' or 'parallel'."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_parameters is not None:
            name = self.target_parameters[0]
            module = name.rpartition(".")[0] or "experts"
            raise ConfigError(
                f"target_parameters={self.target_parameters} names weights, but the adapters of {type(self).__name__} "
                f'read what a module is given or returns. Pass target_modules=["{module}"], the module that holds '
                f"'{name}'; MagnitudeMaskConfig and WeightAdapterConfig take target_parameters."
            )
        if self.activation is not None:
            require_choice("activation", self.activation, sorted(ACTIVATIONS))
        if self.insertion_form is not None:
            require_choice("insertion_form", self.insertion_form, INSERTION_FORMS)
        if self.layer_norm not in (None, True, False):
            raise ConfigError(f"layer_norm={self.layer_norm!r} is invalid: expected True, False or None.")

    def settle_form(self, form: AdapterForm) -> None:
        """Let what was left open be as in ``form``."""
        self.activation = form.activation if self.activation is None else self.activation
        self.layer_norm = form.layer_norm if self.layer_norm is None else self.layer_norm
        self.insertion_form = form.insertion_form if self.insertion_form is None else self.insertion_form

    @property
    def form(self) -> AdapterForm:
        """How the adapter is applied. What is still open is the default."""
        default = AdapterForm()
        return AdapterForm(
            default.activation if self.activation is None else self.activation,
            default.layer_norm if self.layer_norm is None else self.layer_norm,
            default.insertion_form if self.insertion_form is None else self.insertion_form,
        )

    def card_form(self) -> str:
        """Activation and place."""
        return f": {self.form.activation}, {self.form.insertion_form}"
