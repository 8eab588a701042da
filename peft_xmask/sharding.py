"""Tensors that FSDP2 has cut over several processes, whole and cut again."""

from __future__ import annotations

from torch import Tensor


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is sharded over processes (a ``DTensor``); any other as it is.

    Every process has to call it, since a shard's owner sends it.
    """
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def sharded_as(like: Tensor, whole: Tensor) -> Tensor:
    """The inverse of :func:`gathered`: a whole tensor, cut as another one is."""
    if not hasattr(like, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    cut: Tensor = distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]
    return cut
