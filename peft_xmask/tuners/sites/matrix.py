"""The weight of a module as the matrix of a linear map ``y = W x + b``: a row for each feature of the output.

```
linear       W = weight                            x: the input
convolution  W = weight with its kernel flattened  x: the patch beneath the kernel, at each position
embedding    W = weight transposed                 x: the token, one-hot
```
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import conv
from transformers.pytorch_utils import Conv1D


def why_no_matrix(module: nn.Module) -> str | None:
    """Why a module is not the linear map that its weight says, in words that follow "it is"; None if it is.

    A subclass that computes its output in another way is none, nor is a weight that is quantised, sharded or computed.
    """
    kind = type(module).__name__
    if not isinstance(module, (nn.Linear, Conv1D, nn.Embedding, conv._ConvNd)):
        return f"a {kind}, neither a linear layer nor a convolution nor an embedding"
    if type(module.weight) not in (Tensor, nn.Parameter) or not module.weight.is_floating_point():
        return f"a {kind} with a quantised, sharded or otherwise special weight ({type(module.weight).__name__})"
    if "weight" not in module._parameters:
        return f"a {kind} whose weight is computed from other parameters"
    return _why_not_as_in_torch(module)


def _why_not_as_in_torch(module: nn.Module) -> str | None:
    own: Any = type(module)
    known: Any = next(cls for cls in own.__mro__ if cls is Conv1D or cls.__module__.startswith("torch.nn.modules."))
    if own.forward is not known.forward:
        return f"a {own.__name__}, which computes its output in another way than a {known.__name__}"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return f"an {own.__name__} with max_norm, which is no linear map"
    if isinstance(module, conv._ConvNd) and module.groups > 1:
        return f"a {own.__name__} of {module.groups} groups, whose weight cannot mix channels of different groups"
    return None


def matrix_of(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight in the shape of the module's own, as the matrix of its linear map.

    Returns:
        linear ``[out, in]``; convolution ``[out, in * kernel]``; embedding ``[width, tokens]``.
    """
    if isinstance(module, conv._ConvTransposeNd):
        return weight.transpose(0, 1).flatten(1)
    if isinstance(module, conv._ConvNd):
        return weight.flatten(1)
    return weight.T if isinstance(module, (Conv1D, nn.Embedding)) else weight


def in_shape_of_weight(module: nn.Module, matrix: Tensor) -> Tensor:
    """A matrix as :func:`matrix_of` gives it, in the shape of the module's weight."""
    if isinstance(module, conv._ConvTransposeNd):
        return matrix.view(module.weight.transpose(0, 1).shape).transpose(0, 1)
    if isinstance(module, conv._ConvNd):
        return matrix.view(module.weight.shape)
    return matrix.T if isinstance(module, (Conv1D, nn.Embedding)) else matrix
