"""How often optimizers have stepped: fused optimizers change parameters without raising the version of a tensor."""

from __future__ import annotations

import functools
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook


class _Steps:
    count = 0


def steps_taken() -> int:
    """Steps of all optimizers of this process since :func:`count_steps` was first called.

    What was computed from a trained tensor is out of date when this number changes. torch's version counter alone does
    not say so: ``torch.optim.AdamW(fused=True)``, which the Trainer uses by default, leaves it as it is.
    """
    return _Steps.count


@functools.lru_cache(maxsize=1)
def count_steps() -> None:
    """Start to count. Calling it again is harmless."""

    def stepped(*_: Any) -> None:
        _Steps.count += 1

    register_optimizer_step_post_hook(stepped)
