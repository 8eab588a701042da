"""Check that profiles can share one bank."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import BaseMismatchError, ConfigError, PoolMismatchError
from .rows import BankRows

_KIND = (
    "num_adapters",
    "bottleneck_size",
    "mask_type",
    "top_k",
    "mask_weighting",
    "learn_gain",
    "activation",
    "layer_norm",
)


def check_alike(bank: BankRows, other: BankRows) -> None:
    """Reject profiles that do not fit a bank. The error names both sources, if known.

    Raises:
        BaseMismatchError, PoolMismatchError: they are of another base or pool.
        ConfigError: they have other settings, or another head.
    """
    mine, theirs = bank.config, other.config
    here, there = bank.place or "this bank", f" in {other.place}" if other.place else ""
    for field, error in (("pool_fingerprint", PoolMismatchError), ("base_fingerprint", BaseMismatchError)):
        if getattr(mine, field) != getattr(theirs, field):
            raise error(
                f"Expected profiles with {field}={getattr(mine, field)!r}, as {here} has, found "
                f"{getattr(theirs, field)!r}{there}. Profiles serve the base and pool they were trained on.",
                expected=getattr(mine, field),
                found=getattr(theirs, field),
            )
    fields = [*_KIND, "insertion_form", *([] if mine.learn_gain else ["scale"])]
    other_fields = [name for name in fields if getattr(mine, name) != getattr(theirs, name)]
    if other_fields or bank.spec.num_sites != other.spec.num_sites:
        said = ", ".join(f"{name}={getattr(theirs, name)!r} (not {getattr(mine, name)!r})" for name in other_fields)
        raise ConfigError(
            f"Expected profiles like those of {here}, found {said or f'{other.spec.num_sites} sites'}{there}."
        )
    if mine.classifier != theirs.classifier:
        raise ConfigError(
            f"Expected profiles whose head has the labels and the pooling of {here}, {mine.classifier!r:.300}; "
            f"found {theirs.classifier!r:.300}{there}."
        )
    if bank.offset_count != other.offset_count:
        raise ConfigError(
            f"Expected profiles with offsets for {bank.offset_count} outputs, as {here} has, found profiles with "
            f"offsets for {other.offset_count} outputs{there}."
        )
    if other.shared and not same_tensors(bank.shared, other.shared):
        raise ConfigError(
            f"Expected the head that all profiles of {here} share, found another one{there}. A bank holds masks for "
            "one head: train profiles with the head fixed, or keep them as adapters of their own."
        )


def same_tensors(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether the same names have the same tensors, bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[key].cpu(), second[key].cpu()) for key in first)
