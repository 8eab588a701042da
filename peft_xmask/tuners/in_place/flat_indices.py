"""Some elements of a parameter, by their positions in the flattened parameter."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class FlatIndices:
    """Some elements of a parameter.

    Attributes:
        index: long, ``[n]``, ascending positions in the flattened parameter.
        shape: of the parameter.
    """

    def __init__(self, index: Tensor, shape: Sequence[int]) -> None:
        self.shape = torch.Size(shape)
        self.index = index
        self._pattern: Tensor | None = None

    def __len__(self) -> int:
        return self.index.numel()

    def on(self, device: torch.device) -> Tensor:
        """The positions on a device: the same tensor on each call, as long as the device stays the same."""
        if self.index.device != device:
            self.index, self._pattern = self.index.to(device), None
        return self.index

    def pattern(self, dtype: torch.dtype) -> Tensor:
        """A sparse CSR matrix of zeros with one entry per position. Only for parameters with two dimensions."""
        if self._pattern is None or self._pattern.dtype != dtype:
            rows, columns = self.shape
            index = self.index
            starts = torch.searchsorted(index, torch.arange(rows + 1, device=index.device) * columns)
            with warnings.catch_warnings():  # torch warns that its sparse tensors are in beta
                warnings.simplefilter("ignore")
                self._pattern = torch.sparse_csr_tensor(
                    starts.int(),
                    (index % columns).int(),
                    torch.zeros(len(self), dtype=dtype, device=index.device),
                    size=(rows, columns),
                    check_invariants=False,
                )
        return self._pattern

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the pattern, which a copy builds when it needs it."""
        return {**self.__dict__, "_pattern": None}
