"""Random pools, which are stored as a seed.

The adapters come from NumPy's counter-based Philox generator, whose raw streams are guaranteed never to change. Every
matrix has its own counter block, determined by (site, adapter, down or up). Its bits depend on nothing else: not on N,
the device, the number of threads or the order of generation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core.files import require_storage_dtype
from ..core.fingerprint import digest_of_facts
from ..core.sites import Site
from ..errors import ConfigError, PoolMismatchError
from .slice import PoolSlice, hold

NUM_ADAPTERS = 100
"""N of a random pool by default: a mask of it takes 13 bytes, and half of its adapters can be chosen in 1e29 ways."""
BOTTLENECK_SIZE = 12
"""b of a random pool by default. docs/study.md, "Width", says what wider pools bring and what they cost."""
STREAM_VERSION = 1
"""Part of the generator's key and of the fingerprint; another mapping from seeds to numbers gets another version."""

_DOWN, _UP = 0, 1
_ADAPTERS_PER_TASK = 10
_INT16_VARIANCE = (2**32 - 1) / 12
"""Of a uniform integer in [-32768, 32767]."""


@dataclass(frozen=True)
class RandomAdapters:
    """N independent random adapters at any number of sites of any widths.

    Each number of ``down [N, b, d_in]`` is uniform with standard deviation ``1/sqrt(d_in)``, of ``up [N, d_out, b]``
    ``1/sqrt(b)``: an adapter, or a mix whose weights have unit 2-norm, maps an input of unit root mean square to an
    output of about unit root mean square. There are no biases.

    Args:
        num_adapters: N, at least 1.
        bottleneck_size: b, at least 1.
        seed: 0 <= seed < 2**64.
        dtype: float32, or bfloat16 or float16, to which the float32 numbers are rounded.

    Raises:
        ConfigError: a value is out of range, or the dtype is not supported.

    Source: ours; X-PEFT (arXiv 2401.16137) for pools of untrained adapters.
    """

    num_adapters: int
    bottleneck_size: int
    seed: int
    dtype: torch.dtype = torch.float32

    kind = "random"
    mask_weighting = "signed"
    insertion_form = None
    activation = None
    layer_norm = None
    target_modules = None
    nbytes = 0

    def __post_init__(self) -> None:
        for name, least, limit in (("num_adapters", 1, 2**31), ("bottleneck_size", 1, 2**31), ("seed", 0, 2**64)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < limit:
                raise ConfigError(f"{name}={value!r} is invalid: expected a whole number, {least} <= {name} < {limit}.")
        require_storage_dtype(self.dtype)

    @property
    def fingerprint(self) -> str:
        """A fingerprint of everything that determines the values."""
        return digest_of_facts(
            {
                "kind": self.kind,
                "version": STREAM_VERSION,
                "seed": self.seed,
                "num_adapters": self.num_adapters,
                "bottleneck_size": self.bottleneck_size,
            }
        )

    def bind(self, sites: Sequence[Site]) -> list[PoolSlice]:
        """Generate the slices of ``sites``, in order, on the CPU; see :meth:`AdapterPool.bind`."""
        for site in sites:
            if min(site.in_features, site.out_features) < 1:
                raise PoolMismatchError(
                    f"Site '{site.name}' has widths ({site.in_features}, {site.out_features}). Expected at least 1.",
                    expected=(1, 1),
                    found=(site.in_features, site.out_features),
                )
        b = self.bottleneck_size
        blocks = []
        for index, site in enumerate(sites):
            blocks.append(_Block(self.seed, self.num_adapters, index, _DOWN, b, site.in_features, self.dtype))
            blocks.append(_Block(self.seed, self.num_adapters, index, _UP, site.out_features, b, self.dtype))
        tensors = hold(blocks, _generate)
        pairs = zip(blocks[::2], tensors[::2], tensors[1::2], strict=True)
        return [PoolSlice(down, up, origin=(block, up.shape[1])) for block, down, up in pairs]


@dataclass(frozen=True)
class _Block:
    """Everything that determines the tensor ``[num_adapters, rows, columns]`` of one site."""

    seed: int
    num_adapters: int
    site: int
    which: int
    rows: int
    columns: int
    dtype: torch.dtype

    @property
    def scale(self) -> np.float32:
        """The value of one integer step. The number of columns is the fan-in."""
        return np.float32(1.0 / math.sqrt(_INT16_VARIANCE * self.columns))


def _generate(blocks: Sequence[_Block]) -> list[Tensor]:
    """Tensors of the blocks, filled in parallel: Philox and NumPy's arithmetic run without the interpreter's lock."""
    tensors = [
        torch.empty(block.num_adapters, block.rows, block.columns, dtype=block.dtype, device="cpu") for block in blocks
    ]
    with ThreadPoolExecutor(torch.get_num_threads()) as executor:
        tasks = [
            executor.submit(_fill, block, tensor, start)
            for block, tensor in zip(blocks, tensors, strict=True)
            for start in range(0, block.num_adapters, _ADAPTERS_PER_TASK)
        ]
        for task in tasks:
            task.result()
    return tensors


def _fill(block: _Block, tensor: Tensor, start: int) -> None:
    """Write adapters ``start`` onwards: ``number = int16 * scale``, one rounding of an exact product to float32."""
    size = block.rows * block.columns
    for adapter in range(start, min(start + _ADAPTERS_PER_TASK, block.num_adapters)):
        key = np.array([block.seed, STREAM_VERSION], dtype=np.uint64)
        counter = np.array([0, 0, adapter, 2 * block.site + block.which], dtype=np.uint64)
        words = np.random.Philox(key=key, counter=counter).random_raw(-(-size // 4))
        integers = words.astype("<u8", copy=False).view("<i2")[:size]
        target = tensor[adapter].view(-1)
        if block.dtype == torch.float32:
            np.multiply(integers, block.scale, out=target.numpy(), dtype=np.float32)
        else:
            target.copy_(torch.from_numpy(np.multiply(integers, block.scale, dtype=np.float32)))
