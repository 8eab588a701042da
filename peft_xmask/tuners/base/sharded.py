"""Parameters of which each process holds a part: those of FSDP2 (a ``DTensor``) and of DeepSpeed's ZeRO-3."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...core.fingerprint import in_zero3
from ...errors import ConfigError


def gathered(tensor: Tensor) -> Tensor:
    """The full tensor, detached, if it is sharded over processes; any other tensor detached.

    Every process has to call this, because each sends its shard.
    """
    if in_zero3(tensor):
        with _deepspeed().zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    tensor = tensor.detach()
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def sharded_as(like: Tensor, whole: Tensor) -> Tensor:
    """A full tensor, sharded like another one if that is a ``DTensor``."""
    if not hasattr(like, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    cut: Tensor = distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]
    return cut


@contextmanager
def writable(parameters: Iterable[Tensor]) -> Iterator[None]:
    """A context in which trained parameters can be overwritten, without a gradient, by every process alike.

    DeepSpeed trains copies and writes them over the parameters after each step, so the copies get the new values too.
    ZeRO-3's parameters are whole inside of the context.
    """
    everything = list(parameters)
    parts = [each for each in everything if in_zero3(each)]
    with torch.no_grad():
        if not parts:
            yield
        else:
            with _deepspeed().zero.GatheredParameters(parts, modifier_rank=0):
                yield
        for each in everything:
            if hasattr(each, "_z3_optimizer"):
                _deepspeed().utils.safe_set_local_fp32_param(each, each.ds_tensor)  # type: ignore[attr-defined]
            elif hasattr(each, "_hp_mapping"):  # ZeRO-1, ZeRO-2
                _deepspeed().utils.safe_set_full_fp32_param(each, each)


def refuse_parts(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Check that a state dict to be saved has whole tensors where ZeRO-3 has sharded what is trained.

    Raises:
        ConfigError: it has parts.
    """
    for name, parameter in model.named_parameters():
        if not (parameter.requires_grad and in_zero3(parameter) and name in state_dict):
            continue
        if state_dict[name].shape != parameter.ds_shape:  # type: ignore[attr-defined]
            raise ConfigError(
                f"Expected whole tensors to save, found '{name}' sharded over processes by DeepSpeed's ZeRO-3. Save "
                "inside `with deepspeed.zero.GatheredParameters([p for p in model.parameters() if p.requires_grad]):` "
                "in every process, or with the Trainer."
            )


def _deepspeed() -> Any:
    import deepspeed

    return deepspeed
