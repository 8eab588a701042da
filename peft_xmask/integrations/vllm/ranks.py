"""The ranks of a LoRA that vLLM reserves memory for."""

from __future__ import annotations

from ...errors import ConfigError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as ``--max-lora-rank``. An adapter may have any rank up to that."""


def fitting_rank(rank: int) -> int:
    """The smallest of vLLM's ranks that is at least ``rank``.

    Raises:
        ConfigError: there is none.
    """
    for each in RANKS:
        if each >= rank:
            return each
    raise ConfigError(f"vLLM serves LoRAs of rank {RANKS[-1]} at most; these have rank {rank}.")
