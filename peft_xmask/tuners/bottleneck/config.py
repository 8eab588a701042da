"""Configuration of the bottleneck adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ...core.adapter import AdapterForm
from ...errors import ConfigError
from ..base.config import require_number, require_positive
from ..base.peft_private import peft_type
from ..sites.config import SiteConfig

BOTTLENECK_ADAPTER = peft_type("BOTTLENECK_ADAPTER")


@dataclass
class BottleneckConfig(SiteConfig):
    """One adapter at each site: ``scale * (up act(norm(down y + a)) + c)``, added to the module's output ``y``.

    Args:
        bottleneck_size: width b between the projections.
        scale: constant factor on the adapter's output.
        use_bias: whether the projections have biases ``a`` and ``c``.
        dropout: probability of zeroing an input of the up-projection in training.
        init_weights: True: ``down ~ N(0, 0.02)`` and ``up = 0``, so that training starts at the base model. False: both
            ``N(0, 0.02)``, as in AdapterHub.

    The other fields are those of :class:`peft_xmask.tuners.sites.config.SiteConfig`.

    Raises:
        ConfigError: a size below 1, a scale that is not finite, or a dropout outside [0, 1).

    Source: Houlsby et al. (arXiv 1902.00751), placed as in Pfeiffer et al. (arXiv 2005.00247).
    """

    bottleneck_size: int = field(default=48, metadata={"help": "Width between the projections."})
    scale: float = field(default=1.0, metadata={"help": "Constant factor on the adapter's output."})
    use_bias: bool = field(default=True, metadata={"help": "Whether the projections have biases."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout before the up-projection."})
    init_weights: bool = field(default=True, metadata={"help": "Start at the base model (up-projection zero)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BOTTLENECK_ADAPTER
        self.settle_form(AdapterForm())
        require_positive("bottleneck_size", self.bottleneck_size)
        require_number("scale", self.scale, above=-math.inf)
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout!r} is invalid: expected a number from 0 up to, not including, 1.")

    def card_facts(self) -> list[tuple[str, object]]:
        """The method's settings, as rows of a model card."""
        return [("bottleneck size", self.bottleneck_size)]
