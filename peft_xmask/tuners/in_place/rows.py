"""A parameter as a matrix with one row for each output of its module."""

from __future__ import annotations

from enum import Enum

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Rows(Enum):
    """How a parameter of more than one dimension is stored; one of a single dimension is one row.

    ``FIRST``: ``[out, in, ...]``. ``LAST``: ``[in, out]``. ``EXPERTS_FIRST``: ``[experts, out, in]``. ``EXPERTS_LAST``:
    ``[experts, in, out]``. Of fused experts, every output of every expert is a row.
    """

    FIRST = "out, in, ..."
    LAST = "in, out"
    EXPERTS_FIRST = "experts, out, in"
    EXPERTS_LAST = "experts, in, out"


def rows_of(module: nn.Module, name: str) -> Rows:
    """How a module stores one of its parameters.

    Of fused experts the module says so itself (``is_transposed``, as transformers and PEFT read it). Where it does not,
    a ``weight`` is taken for that of linear layers, ``[experts, out, in]``, and any other parameter for one that tokens
    are multiplied by as it is, ``[experts, in, out]``, as in Llama 4.
    """
    if name == "weight" and isinstance(module, Conv1D):
        return Rows.LAST
    parameter: Tensor = getattr(module, name)
    if parameter.dim() != 3 or isinstance(module, (nn.modules.conv._ConvNd, nn.Bilinear)):
        return Rows.FIRST
    last = getattr(module, "is_transposed", name != "weight")
    return Rows.EXPERTS_LAST if last else Rows.EXPERTS_FIRST


def as_rows(parameter: Tensor, rows: Rows) -> Tensor:
    """The parameter as a matrix.

    Shapes: ``[d] -> [1, d]``, ``[out, in, ...] -> [out, in * ...]``, ``[in, out] -> [out, in]``, and fused experts to
    ``[experts * out, in]``.
    """
    if parameter.dim() == 1:
        return parameter.unsqueeze(0)
    if rows is Rows.LAST:
        return parameter.t()
    if rows is Rows.EXPERTS_LAST:
        return parameter.transpose(1, 2).flatten(0, 1)
    return parameter.flatten(0, 1) if rows is Rows.EXPERTS_FIRST else parameter.flatten(1)


def from_rows(matrix: Tensor, rows: Rows, like: Tensor) -> Tensor:
    """The matrix in the shape in which the parameter ``like`` is stored."""
    if rows is Rows.LAST and like.dim() > 1:
        return matrix.t()
    if rows is Rows.EXPERTS_LAST:
        experts, width, outputs = like.shape
        return matrix.view(experts, outputs, width).transpose(1, 2)
    return matrix.reshape(like.shape)
