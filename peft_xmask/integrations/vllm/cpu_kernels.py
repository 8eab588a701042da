"""Detect a bug in vLLM's LoRA kernels for the CPU, and work around it.

A row of a batch that has no adapter has the index -1. The kernels index a tensor with it, which gives the *last* slot's
adapter: in a mixed batch, the base model then answers like some profile. GPU kernels skip such rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger

LOG = init_logger("vllm.peft_xmask")
_KERNELS = ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")


def fix() -> bool:
    """Patch the kernels of this process if they have the bug.

    Returns:
        whether they had it.
    """
    from vllm.lora.ops import torch_ops
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    if not is_faulty(lora_ops):
        return False
    for name in _KERNELS:
        mended = _mended(getattr(lora_ops, name))
        for module in (lora_ops, torch_ops, punica_cpu):
            if hasattr(module, name):
                setattr(module, name, mended)
    LOG.info("peft_xmask: the CPU's LoRA kernels gave rows without an adapter that of the last slot; mended.")
    return True


def is_faulty(ops: Any) -> bool:
    """Test on small tensors whether a row without an adapter gets one."""
    index = torch.tensor([-1, 0])
    found = torch.zeros(2, 1)
    ops.bgmv_shrink(torch.ones(2, 3), torch.ones(2, 1, 1, 3), found, index, 1.0)
    written = torch.zeros(2, 3)
    ops.bgmv_expand(torch.ones(2, 1), torch.ones(2, 1, 3, 1), written, index, True)
    sliced = torch.zeros(2, 3)
    ops.bgmv_expand_slice(torch.ones(2, 1), torch.ones(2, 1, 3, 1), sliced, index, 0, 3, True)
    return bool(found[0].any() or written[0].any() or sliced[0].any())


def _mended(kernel: Callable[..., None]) -> Callable[..., None]:
    """A kernel that leaves rows without an adapter unchanged. It does not branch on values, so it can be compiled."""

    def run(inputs: Tensor, weights: Tensor, output: Tensor, index: Tensor, *args: Any, **kwargs: Any) -> None:
        has_adapter = (index >= 0).unsqueeze(-1)
        before = output.clone()
        kernel(inputs, weights, output, index.clamp(min=0), *args, **kwargs)
        output.copy_(torch.where(has_adapter, output, before))

    return run
