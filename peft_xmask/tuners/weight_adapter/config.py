"""Configuration of the weight adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ...core.adapter import ACTIVATIONS
from ...errors import ConfigError
from ..base.config import TargetConfig, require_choice, require_positive
from ..base.peft_private import peft_type

WEIGHT_ADAPTER = peft_type("WEIGHT_ADAPTER")

TARGETS = ("bias", "weight", "both")
STORAGE_DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class WeightAdapterConfig(TargetConfig):
    """An adapter over the base's own parameters: ``b' = b + s f(b D + c) U`` and ``W' = W + s f(W D + c) U``.

    ``D``, ``U`` and ``c`` are trained. The file holds the change that they make, of the shape of the bias or weight,
    whatever ``r`` is. In inference the base uses ``b'`` or ``W'`` in place of ``b`` or ``W``.

    Args:
        target: ``"bias"``, ``"weight"`` or ``"both"``: the biases of the targeted modules, their weights, or their
            weights and the biases that exist.
        r: width of ``f(b D + c)``: ``D`` is ``[d, r]``, ``U`` is ``[r, d]``, d the length of a bias or of a row of a
            weight.
        activation: f, one of ``peft_xmask.core.adapter.ACTIVATIONS``.
        scale: s.
        dropout: probability of zeroing an element of ``f(b D + c)`` in training; drawn once per optimizer step.
        adapter_bias: whether to train ``c``. None: only where the bias or weight is all zero, since ``f(0 D)`` would
            never change it.
        storage_dtype: dtype of the saved change; None: ``"float32"``. With ``"bfloat16"`` or ``"float16"`` it is
            rounded wherever it is used, in training too, so that a file gives exactly what was evaluated.
        init_weights: True: ``U`` starts at zero, so the model starts as the base. False: at random, for tests.
        target_modules: modules of any kind with a bias (or weight): linear, convolution, normalisation. None: the
            linear layers of the feed-forward network of each block, for the architectures in
            ``peft_xmask.tuners.base.targets.FFN_LINEAR``.

    The other fields are those of :class:`peft_xmask.tuners.base.config.TargetConfig`.

    Raises:
        ConfigError: a field has an invalid value.

    Source: HiWi (Liao, Meng & Monz, arXiv 2305.16742); ``c`` and the starting values are ours.
    """

    target: str = field(default="bias", metadata={"help": "'bias', 'weight' or 'both'."})
    r: int = field(default=16, metadata={"help": "Width between the two matrices."})
    activation: str = field(default="relu", metadata={"help": "Between the two matrices."})
    scale: float = field(default=1.0, metadata={"help": "Constant factor on the change."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout before the second matrix."})
    adapter_bias: bool | None = field(default=None, metadata={"help": "Inner bias; None: where the input is all zero."})
    storage_dtype: str | None = field(default=None, metadata={"help": "Dtype of the saved change; None: float32."})
    init_weights: bool = field(default=True, metadata={"help": "Start at the base model; False: at random."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = WEIGHT_ADAPTER
        require_choice("target", self.target, TARGETS)
        require_positive("r", self.r)
        require_choice("activation", self.activation, sorted(ACTIVATIONS))
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)) or not math.isfinite(self.scale):
            raise ConfigError(f"scale={self.scale!r} is invalid: expected a finite number.")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout={self.dropout!r} is invalid: expected 0 <= dropout < 1.")
        if self.adapter_bias not in (None, True, False):
            raise ConfigError(f"adapter_bias={self.adapter_bias!r} is invalid: expected None, True or False.")
        if self.storage_dtype is not None:
            require_choice("storage_dtype", self.storage_dtype, STORAGE_DTYPES)

    def card_facts(self) -> list[tuple[str, object]]:
        """The method's settings, as rows of a model card."""
        read = {"bias": "biases", "weight": "weights", "both": "weights and biases"}[self.target]
        stored = self.storage_dtype or "float32"
        return [("adapter", f"r = {self.r}, {self.activation}, over {read}; only its result is kept, in {stored}")]
