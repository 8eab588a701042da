"""Where the masks of a model are: the attribute of its root, and the names of their tensors in files."""

from __future__ import annotations

TABLE = "mask_table"
"""Attribute of the base model's root that holds the masks. Its name must not start with the tuner's prefix."""

LOGITS, GAIN = "xpeft_logits", "xpeft_gain"
"""What is trained."""

BITS, GAIN_BITS, OFFSET_BITS = "xpeft_bits", "xpeft_gain_bits", "xpeft_offset_bits"
"""What is shipped."""

PARTS = (LOGITS, GAIN, BITS, GAIN_BITS, OFFSET_BITS)


def ending(part: str, adapter_name: str | None = None) -> str:
    """The end of a tensor's name: in a model's state dict with the adapter's name, in a file without it."""
    return ".".join((TABLE, part, *([] if adapter_name is None else [adapter_name]), "weight"))


def file_key(part: str) -> str:
    """The name of a tensor in an adapter file that PEFT saved."""
    return f"base_model.model.{ending(part)}"
