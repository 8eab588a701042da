"""Configuration of the magnitude mask."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...core.files import dtype_from_name
from ...errors import ConfigError
from ..base.config import TargetConfig, require_choice
from ..base.peft_private import peft_type
from .mask import Rule

MAGNITUDE_MASK = peft_type("MAGNITUDE_MASK")

SELECTIONS = ("smallest", "largest", "random")
SCOPES = ("module", "model")
STORAGE_DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class MagnitudeMaskConfig(TargetConfig):
    """Train the base's weights of smallest magnitude: ``w' = w + v`` where the mask selects ``w``, and ``w`` elsewhere.

    Only ``v`` is trained and saved. The mask is a function of the base, so it is the same for every task; its
    fingerprint is checked when a file is loaded.

    Args:
        density: share of the weights that are trained, in (0, 1].
        selection: ``"smallest"`` magnitudes, or ``"largest"`` or ``"random"`` for comparison.
        scope: ``"module"``: the density holds in every module; ``"model"``: one threshold for all of them.
        include_bias: whether the biases of the targeted modules take part. They always do in modules whose weight has
            one dimension, such as a LayerNorm.
        storage_dtype: dtype of the saved values; None: ``"float32"``. With ``"bfloat16"`` or ``"float16"`` values are
            rounded wherever they are used, in training too, so that a file gives exactly what was evaluated.
        seed: seed of a random selection.
        init_weights: True: values start at zero, so the model starts as the base. False: random values as large as the
            weights, for tests.
        target_modules: modules of any kind with a ``weight``: linear, embedding, convolution, normalisation. None:
            every linear layer of the blocks.
        mask_fingerprint: the mask's fingerprint; recorded when the adapter is made, checked when it is loaded.
        mask_dtype: the dtype in which magnitudes were compared; recorded.
        mask_ties: by dtype, which of the magnitudes that equal the threshold there were chosen; recorded, so that a
            base can be loaded in another dtype.

    The other fields are those of :class:`peft_xmask.tuners.base.config.TargetConfig`.

    Raises:
        ConfigError: a field has an invalid value.

    Source: PaFi (Liao, Meng & Monz, arXiv 2305.16742).
    """

    density: float = field(default=0.005, metadata={"help": "Share of the weights that are trained."})
    selection: str = field(default="smallest", metadata={"help": "'smallest', 'largest' or 'random'."})
    scope: str = field(default="module", metadata={"help": "One threshold per 'module', or for the whole 'model'."})
    include_bias: bool = field(default=False, metadata={"help": "Whether biases of targeted modules may be selected."})
    storage_dtype: str | None = field(default=None, metadata={"help": "Dtype of the saved values; None: float32."})
    seed: int = field(default=0, metadata={"help": "Seed of a random selection."})
    init_weights: bool = field(default=True, metadata={"help": "Start at the base model; False: at random."})
    mask_fingerprint: str | None = field(default=None, metadata={"help": "Fingerprint of the mask."})
    mask_dtype: str | None = field(default=None, metadata={"help": "Dtype in which magnitudes were compared."})
    mask_ties: dict[str, str] | None = field(default=None, metadata={"help": "Choices among equal magnitudes."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MAGNITUDE_MASK
        if isinstance(self.density, bool) or not isinstance(self.density, (int, float)) or not 0 < self.density <= 1:
            raise ConfigError(f"density={self.density!r} is invalid: expected a number above 0 and at most 1.")
        require_choice("selection", self.selection, SELECTIONS)
        require_choice("scope", self.scope, SCOPES)
        if self.storage_dtype is not None:
            require_choice("storage_dtype", self.storage_dtype, STORAGE_DTYPES)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed={self.seed!r} is invalid: expected a whole number from 0 to 2**64 - 1.")
        if self.mask_fingerprint is not None:
            dtype_from_name(str(self.mask_dtype))

    def card_facts(self) -> list[tuple[str, object]]:
        """The method's settings, as rows of a model card."""
        return [
            ("trained", f"{self.density:.3%} of the weights of each {self.scope}, {self.selection} first"),
            ("mask fingerprint", f"`{self.mask_fingerprint}`, on a base in {self.mask_dtype}"),
        ]

    @property
    def rule(self) -> Rule:
        """How the mask is chosen."""
        return Rule(self.density, self.selection, self.scope, self.seed)

    def allow_any_base(self) -> None:
        """Forget the base and the mask this adapter was made for, to load its values on another base on purpose."""
        super().allow_any_base()
        self.mask_fingerprint = self.mask_dtype = self.mask_ties = None
