"""A down- and an up-projection as they come from a file, checked and with the scale folded in."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..errors import FileFormatError
from .trained import SiteTensors


def site_of_projections(
    where: str, parts: Mapping[str, Tensor], bottleneck_size: int, bias: bool, scale: float | Tensor
) -> SiteTensors:
    """One adapter at one site.

    Args:
        where: for errors: site and folder.
        parts: ``down.weight [b, d_in]``, ``up.weight [d_out, b]`` and, with ``bias``, ``down.bias [b]``,
            ``up.bias [d_out]``.
        bottleneck_size: b.
        bias: whether there must be biases.
        scale: a number, or a tensor of shape ``[1]`` or ``[d_out]``.

    Raises:
        FileFormatError: a part is missing, there are others, or their shapes do not fit.
    """
    names = {"down.weight", "up.weight", *(("down.bias", "up.bias") if bias else ())}
    if set(parts) != names:
        raise FileFormatError(f"Expected the tensors {sorted(names)} at {where}, found {sorted(parts)}.")
    down, up = parts["down.weight"], parts["up.weight"]
    fits = down.dim() == up.dim() == 2 and down.shape[0] == up.shape[1] == bottleneck_size
    if fits and bias:
        fits = parts["down.bias"].shape == down.shape[:1] and parts["up.bias"].shape == up.shape[:1]
    if not fits:
        shapes = {name: tuple(tensor.shape) for name, tensor in sorted(parts.items())}
        raise FileFormatError(f"Expected a bottleneck of {bottleneck_size} at {where}, found shapes {shapes}.")
    rows = scale.float().view(-1, 1) if isinstance(scale, Tensor) else scale
    return SiteTensors(
        down=down,
        up=(up.float() * rows).to(up.dtype),
        down_bias=parts.get("down.bias"),
        up_bias=(parts["up.bias"].float() * scale).to(up.dtype) if bias else None,
    )
