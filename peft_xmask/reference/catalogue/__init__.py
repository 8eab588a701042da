"""The cards, by family. Importing this registers them; a new method is one more card in the file it belongs to."""

from . import frozen_bases, in_place, low_rank, mixtures, ours, prompts, sequential

__all__ = ["frozen_bases", "in_place", "low_rank", "mixtures", "ours", "prompts", "sequential"]
