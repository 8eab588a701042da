"""Fingerprints identify the base or pool that a file belongs to.

A fingerprint is a digest of *sign bits*. A cast between float32, bfloat16 and float16 never changes the sign bit of a
finite number (an underflow gives a signed zero), so a base or pool loaded in another dtype keeps its fingerprint. Other
weights almost surely do not, because all of the thousands of sampled signs would have to agree. A fingerprint cannot
detect a change that flips no sampled sign, such as multiplying a matrix by two or editing a handful of weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

SIGNS_PER_TENSOR = 16_384
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def sample_signs(tensor: Tensor, limit: int | None = SIGNS_PER_TENSOR) -> bytes:
    """Sign bits of up to ``limit`` elements, evenly spaced in the flat tensor, packed eight to a byte.

    Args:
        tensor: floating point, any shape.
        limit: None takes every element.
    """
    flat = tensor.detach().reshape(-1)
    if limit is not None and flat.numel() > limit:
        flat = flat[:: -(-flat.numel() // limit)]
    return np.packbits(torch.signbit(flat).cpu().numpy()).tobytes()


def digest_of(parts: Iterable[bytes]) -> str:
    """First 16 hexadecimal digits of the SHA-256 of ``parts``, each preceded by its length."""
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.hexdigest()[:16]


def digest_of_facts(facts: Mapping[str, object]) -> str:
    """Fingerprint of plain facts (numbers and strings), independent of their order."""
    return digest_of([json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()])


def fingerprint_weights(weights: Iterable[Tensor | None]) -> str | None:
    """Fingerprint of a sequence of weights: their shapes and sampled signs, in order.

    Returns:
        16 hexadecimal digits; None when a weight is missing, on the meta device, sharded by ZeRO-3, or not stored as
        plain floating point numbers (a quantised base), because then its signs cannot be read.
    """
    parts: list[bytes] = []
    for weight in weights:
        if weight is None or weight.is_meta or weight.dtype not in _FLOATS or not _is_plain(weight):
            return None
        parts += [repr(tuple(weight.shape)).encode(), sample_signs(weight)]
    return digest_of(parts)


def in_zero3(tensor: Tensor) -> bool:
    """Whether it is a parameter that DeepSpeed's ZeRO-3 has sharded over processes."""
    return hasattr(tensor, "ds_id")


def _is_plain(weight: Tensor) -> bool:
    return type(weight) in (Tensor, torch.nn.Parameter) and not in_zero3(weight)
