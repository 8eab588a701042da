"""A bank without its offsets, for a model to which the caller adds them."""

from __future__ import annotations

from ..bank.bank import ProfileBank


def without_offsets(bank: ProfileBank) -> ProfileBank:
    """The same masks and head."""
    content = bank.content()
    assert content.names is not None
    return ProfileBank(bank.config, content.bits, content.gain_bits, content.names, content.shared)
