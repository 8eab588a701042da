"""The gradient of a frozen parameter, read in the few forms that adapters need without ever being stored.

An adapter in place trains something that was added to a parameter: some of its elements, all of them, or a product of
small matrices. Its gradient follows from the parameter's. For a linear module that gradient is itself a product of two
activations, ``G = written^T read``, so its elements, and its products with small matrices, cost far less than ``G``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .flat_indices import FlatIndices
from .rows import Rows, as_rows

SAMPLED_DENSITY = 0.05
"""Up to this fraction of a matrix, a CPU computes only the wanted entries of its gradient: docs/magnitude_mask.md."""

BLOCK = 352
"""Tokens that are transposed at a time. Rows of a power of two would share few of the cache's sets."""


class ParameterGradient(ABC):
    """The gradient of one parameter.

    As a matrix, G, it has one row per output of the module: ``[1, d]`` for a vector, see
    :func:`~peft_xmask.tuners.in_place.rows.as_rows`.
    """

    @abstractmethod
    def whole(self) -> Tensor:
        """The gradient, of the parameter's shape."""

    @abstractmethod
    def at(self, indices: FlatIndices) -> Tensor:
        """Some of its elements, ``[n]``."""

    @abstractmethod
    def times(self, matrix: Tensor) -> Tensor:
        """``G m``, float32, ``[rows, r]``, for ``m [d, r]``."""

    @abstractmethod
    def transpose_times(self, matrix: Tensor) -> Tensor:
        """``G^T m``, float32, ``[d, r]``, for ``m [rows, r]``."""


class DenseGradient(ParameterGradient):
    """A gradient that autograd has computed.

    Args:
        grad: of the parameter's shape; may be sparse, as an embedding's.
        rows: how the parameter is stored.
    """

    def __init__(self, grad: Tensor, rows: Rows = Rows.FIRST) -> None:
        self.grad = grad.to_dense() if grad.is_sparse else grad
        self.rows = rows

    def whole(self) -> Tensor:
        """The gradient, of the parameter's shape."""
        return self.grad

    def at(self, indices: FlatIndices) -> Tensor:
        """Some of its elements, ``[n]``."""
        return self.grad.reshape(-1).index_select(0, indices.on(self.grad.device))

    def times(self, matrix: Tensor) -> Tensor:
        """``G m``, float32, ``[rows, r]``, for ``m [d, r]``."""
        return as_rows(self.grad, self.rows).float() @ matrix.float()

    def transpose_times(self, matrix: Tensor) -> Tensor:
        """``G^T m``, float32, ``[d, r]``, for ``m [rows, r]``."""
        return as_rows(self.grad, self.rows).float().t() @ matrix.float()


class LinearWeightGradient(ParameterGradient):
    """The gradient of a linear module's weight, ``G = written^T read``.

    Args:
        written: ``[T, out]``, the gradient of the module's output.
        read: ``[T, in]``, the module's input.
        fan_in_fan_out: whether the weight is stored as ``[in, out]`` (transformers' Conv1D).
    """

    def __init__(self, written: Tensor, read: Tensor, *, fan_in_fan_out: bool) -> None:
        self.written, self.read, self.fan_in_fan_out = written, read, fan_in_fan_out
        self._found: dict[int, Tensor] = {}

    def whole(self) -> Tensor:
        """The gradient, of the weight's shape."""
        left, right = self._factors()
        return left.t() @ right.to(left.dtype)

    def at(self, indices: FlatIndices) -> Tensor:
        """Some of its elements, ``[n]``; computed once for adapters that share their indices."""
        if id(indices) not in self._found:
            self._found[id(indices)] = product_at(*self._factors(), indices)
        return self._found[id(indices)]

    def times(self, matrix: Tensor) -> Tensor:
        """``G m = written^T (read m)``, float32, ``[out, r]``."""
        read = self.read.to(self.written.dtype)
        return (self.written.t() @ (read @ matrix.to(read.dtype))).float()

    def transpose_times(self, matrix: Tensor) -> Tensor:
        """``G^T m = read^T (written m)``, float32, ``[in, r]``."""
        read = self.read.to(self.written.dtype)
        return (read.t() @ (self.written @ matrix.to(self.written.dtype))).float()

    def _factors(self) -> tuple[Tensor, Tensor]:
        return (self.read, self.written) if self.fan_in_fan_out else (self.written, self.read)


def product_at(left: Tensor, right: Tensor, indices: FlatIndices) -> Tensor:
    """Some entries of ``left^T right``.

    On a CPU, if they are few, only these entries are computed; otherwise the product is computed and freed.

    Shapes: ``[T, rows], [T, columns] -> [n]``, the entries in the order of ``indices``.
    """
    index = indices.on(left.device)
    if left.device.type == "cpu" and len(indices) <= SAMPLED_DENSITY * indices.shape.numel():
        return _sampled(left, right, indices)
    common = left.dtype
    return (left.t() @ right.to(common)).view(-1).index_select(0, index)


def _sampled(left: Tensor, right: Tensor, indices: FlatIndices) -> Tensor:
    """The entries alone: one dot product for each, over tokens that must lie side by side.

    Nearly all of the time goes into transposing the factors for that. So they are transposed and multiplied in blocks
    that stay in the processor's cache, one for each thread at a time.
    """
    wide = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    product = indices.pattern(wide)
    step = BLOCK * torch.get_num_threads()
    for some_left, some_right in zip(left.split(step), right.split(step), strict=True):
        for rows, columns in zip(_blocks(some_left.to(wide)), _blocks(some_right.to(wide)), strict=True):
            product = torch.sparse.sampled_addmm(product, rows, columns.t())
    return product.values()


def _blocks(tokens: Tensor) -> list[Tensor]:
    """``[T, d]`` transposed, as contiguous ``[d, BLOCK]`` and a last one that may be smaller."""
    whole = len(tokens) - len(tokens) % BLOCK
    return [block for part in (tokens[:whole], tokens[whole:]) if len(part) for block in _transposed(part)]


def _transposed(tokens: Tensor) -> Tensor:
    """``[T, d] -> [T / size, d, size]`` with ``size = min(T, BLOCK)``.

    To shuffle the channels of ``T / size`` pixels, ``size`` groups of d channels each, is to transpose each pixel. It
    takes about half as long as ``tokens.t().contiguous()``, and runs one thread a pixel.
    """
    size, width = min(len(tokens), BLOCK), tokens.shape[-1]
    pixels = tokens.reshape(1, -1, 1, size * width).permute(0, 3, 1, 2)  # [1, size * d, T / size, 1], channels last
    return torch.channel_shuffle(pixels, size).permute(0, 2, 3, 1).reshape(-1, width, size)
