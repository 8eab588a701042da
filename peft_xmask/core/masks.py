"""Pure tensor maths: masks from logits, mixing a pool, applying the mixed adapter. No modules, no state.

Shapes: N adapters in a pool, b the bottleneck, d_in and d_out the widths of a site, R rows (profiles) mixed at once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

ESTIMATORS = ("straight_through", "softmax", "sigmoid")
"""How a gradient passes a hard mask; see :func:`hard_mask`."""


MASK_WEIGHTINGS = ("variance", "mean", "signed")
"""The weights of a mask; see :func:`hard_weights`."""


GAIN_STEP = 0.1
"""How fast the logarithm of a gain moves, against a logit."""


def hard_mask(logits: Tensor, top_k: int, *, estimator: str, weighting: str, temperature: float = 1.0) -> Tensor:
    """Choose exactly ``top_k`` of N, with a surrogate gradient.

    The ``top_k`` largest logits are chosen (of equal ones the lower index wins), and :func:`hard_weights` gives each
    its weight, of size w. The gradient is that of a surrogate:

    - ``straight_through``: ``m = w * logits``;
    - ``softmax``: ``m = w * k * softmax(logits / temperature)``;
    - ``sigmoid``: ``m = w * sigmoid((logits - t) / temperature)``, where t is half-way between the smallest chosen
      logit and the largest other one.

    Args:
        logits: float32, shape ``[..., N]``.

    Returns:
        float32, shape ``[..., N]``.

    Source: X-PEFT (arXiv 2401.16137) for k-hot masks; the choice of estimators and weightings is ours.
    """
    mask: Tensor = _HardMask.apply(logits, top_k, estimator, weighting, temperature)  # type: ignore[no-untyped-call]
    return mask


def soft_mask(logits: Tensor, *, weighting: str, temperature: float = 1.0) -> Tensor:
    """Softmax weights of logits that are first rounded to half precision, as they are shipped.

    ``s = softmax(half(logits / temperature))``. ``weighting="mean"`` gives ``m = s``, ``weighting="variance"`` gives
    ``m = s / |s|_2``.

    Args:
        logits: float32, shape ``[..., N]``.

    Returns:
        float32, shape ``[..., N]``.

    Source: X-PEFT (arXiv 2401.16137); the ``variance`` weighting is ours.
    """
    mask: Tensor = _SoftMask.apply(logits, weighting == "variance", temperature)  # type: ignore[no-untyped-call]
    return mask


_LOG_OF_ZERO = -50.0
"""Half precision rounds any scale times e to this power to zero."""


def scaled_gain(weight: Tensor, scale: float, logit_scale: float) -> Tensor:
    """Gain of a site from what is trained: ``g = half(scale * exp(0.1 * logit_scale * weight))``.

    Rounded to half precision, as shipped; the gradient passes the rounding as if it were not there.

    Args:
        weight: float32, any shape.

    Returns:
        float32, same shape.
    """
    gain: Tensor = _Gain.apply(weight, scale, GAIN_STEP * logit_scale)  # type: ignore[no-untyped-call]
    return gain


def gain_weight(gain: Tensor, scale: float, logit_scale: float) -> Tensor:
    """Inverse of :func:`scaled_gain`. A gain of 0 has a finite weight too, since half precision rounds to 0."""
    return torch.log(gain / scale).clamp_min(_LOG_OF_ZERO) / (GAIN_STEP * logit_scale)


def pick_rows(table: Tensor, rows: int | Tensor | None) -> Tensor:
    """Rows of a table, with a gradient that may be asked for more than once.

    A table with a list ``row_gradients`` gets its gradient there, as pairs of rows ``[R]`` and gradients ``[R, ...]``,
    and not in ``grad``: nothing of the table's size is made.

    Shapes: ``[P, ...]`` and ``rows [R]`` give ``[R, ...]``; one whole number gives ``[1, ...]``; None gives all.

    Args:
        rows: -1 stands for none: it gives row 0 and hands no gradient to it.
    """
    if rows is None:
        return table
    collected = None if torch.compiler.is_compiling() else getattr(table, "row_gradients", None)
    if isinstance(rows, int):
        if collected is None:
            return table[rows : rows + 1]
        rows = torch.tensor([rows])
    picked: Tensor = _PickRows.apply(table, rows.to(table.device), collected)  # type: ignore[no-untyped-call]
    return picked


def require(condition: Tensor, error: Exception) -> None:
    """Raise an error unless a condition holds; in a graph that is being compiled, assert it when the graph runs.

    Args:
        condition: bool, one element.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(condition, str(error))
    elif not condition:
        raise error


def select_top_k(logits: Tensor, top_k: int) -> Tensor:
    """The ``top_k`` largest of the last dimension as booleans; of equal logits the lower index wins, on any device.

    Shapes: ``[..., N] -> [..., N]``.
    """
    chosen = torch.sort(logits, dim=-1, descending=True, stable=True).indices[..., :top_k]
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, chosen, True)


def hard_weights(chosen: Tensor, top_k: int, weighting: str) -> Tensor:
    """Weights of hard masks, float32: ``w`` for a chosen adapter; 0, or with ``signed`` ``-w``, for any other.

    ``w`` is ``1/sqrt(k)`` for ``variance``, ``1/k`` for ``mean`` and ``1/sqrt(N)`` for ``signed``. With ``variance``
    and ``signed`` a mix of independent adapters has the variance of one adapter. With ``signed`` the mask steers all of
    that variance; with ``variance`` and k = N/2, half of it is the same for every mask.

    Shapes: booleans ``[..., N] -> [..., N]``.
    """
    weight = _weight(chosen.shape[-1], top_k, weighting)
    ones = chosen.float()
    return (2.0 * ones - 1.0) * weight if weighting == "signed" else ones * weight


def _weight(num_adapters: int, top_k: int, weighting: str) -> float:
    return 1.0 / top_k if weighting == "mean" else 1.0 / math.sqrt(num_adapters if weighting == "signed" else top_k)


def mix(mask: Tensor, pool: Tensor) -> Tensor:
    """Mix a pool's tensors with the masks as weights: ``out[r] = sum_i mask[r, i] pool[i]``. One GEMM.

    The pool stays in its own dtype under autocast: casting it whole would cost more than the mixing.

    Shapes: ``[R, N], [N, ...] -> [R, ...]``.

    Source: X-PEFT (arXiv 2401.16137): submodules are mixed as matrices, not by averaging adapter outputs.
    """
    if torch.is_autocast_enabled(pool.device.type):
        with torch.autocast(device_type=pool.device.type, enabled=False):
            return _mixed(mask, pool)
    return _mixed(mask, pool)


def _mixed(mask: Tensor, pool: Tensor) -> Tensor:
    flat = pool.flatten(1)
    weights = mask.to(device=pool.device, dtype=pool.dtype)
    mixed = torch.mv(flat.t(), weights[0]) if weights.shape[0] == 1 else weights @ flat
    return mixed.view(weights.shape[0], *pool.shape[1:])


def scaled_rows(mask: Tensor, gain: Tensor) -> Tensor:
    """Masks times gains: ``out[..., i] = mask[..., i] gain``. Shapes: ``[R, S, N], [R, S] -> [R, S, N]``."""
    scaled: Tensor = _ScaledRows.apply(mask, gain)  # type: ignore[no-untyped-call]
    return scaled


class _HardMask(torch.autograd.Function):
    """Keeps what it needs on ``ctx`` rather than in ``save_for_backward``.

    All sites share one mask, and reentrant checkpointing runs one backward pass for every block: saved tensors would
    be freed by the first of them.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, top_k: int, estimator: str, weighting: str, temperature: float) -> Tensor:
        selected = select_top_k(logits, top_k)
        ctx.estimator, ctx.temperature, ctx.top_k = estimator, temperature, top_k
        ctx.weight = _weight(logits.shape[-1], top_k, weighting)
        if estimator == "softmax":
            ctx.stand_in = torch.softmax(logits / temperature, dim=-1)
        elif estimator == "sigmoid":
            last_in = logits.masked_fill(~selected, torch.inf).amin(-1, keepdim=True)
            first_out = logits.masked_fill(selected, -torch.inf).amax(-1, keepdim=True)
            threshold = torch.where(first_out.isinf(), last_in, (last_in + first_out) / 2)
            ctx.stand_in = torch.sigmoid((logits - threshold) / temperature)
        return hard_weights(selected, top_k, weighting).to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        grad = grad * ctx.weight
        if ctx.estimator == "softmax":
            soft = ctx.stand_in
            grad = soft * (grad - (grad * soft).sum(-1, keepdim=True)) * (ctx.top_k / ctx.temperature)
        elif ctx.estimator == "sigmoid":
            grad = grad * ctx.stand_in * (1 - ctx.stand_in) / ctx.temperature
        return grad, None, None, None, None


class _SoftMask(torch.autograd.Function):
    """As :class:`_HardMask`, for softmax weights."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, unit_norm: bool, temperature: float) -> Tensor:
        soft = torch.softmax((logits / temperature).half().float(), dim=-1)
        ctx.soft, ctx.unit_norm, ctx.temperature = soft, unit_norm, temperature
        return soft / soft.norm(dim=-1, keepdim=True) if unit_norm else soft.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        soft = ctx.soft
        if ctx.unit_norm:
            size = soft.norm(dim=-1, keepdim=True)
            unit = soft / size
            grad = (grad - unit * (grad * unit).sum(-1, keepdim=True)) / size
        return soft * (grad - (grad * soft).sum(-1, keepdim=True)) / ctx.temperature, None, None


class _Gain(torch.autograd.Function):
    """As :class:`_HardMask`, for gains."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: float, step: float) -> Tensor:
        gain = (scale * torch.exp(step * weight)).half().float()
        ctx.gain, ctx.step = gain, step
        return gain.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.gain * ctx.step, None, None


class _ScaledRows(torch.autograd.Function):
    """As :class:`_HardMask`, for masks times gains."""

    @staticmethod
    def forward(ctx: Any, mask: Tensor, gain: Tensor) -> Tensor:
        ctx.mask, ctx.gain = mask, gain
        return mask * gain.unsqueeze(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad * ctx.gain.unsqueeze(-1), (grad * ctx.mask).sum(-1)


class _PickRows(torch.autograd.Function):
    """As :class:`_HardMask`, for rows of a table."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor, collected: list[tuple[Tensor, Tensor]] | None) -> Tensor:
        ctx.rows, ctx.shape, ctx.collected = rows, table.shape, collected
        return table.index_select(0, rows.clamp_min(0))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        there = ctx.rows >= 0
        if ctx.collected is not None:
            ctx.collected.append((ctx.rows[there], grad[there]))
            return None, None, None
        grad = grad * there.view(-1, *[1] * (grad.dim() - 1))
        return grad.new_zeros(ctx.shape).index_add_(0, ctx.rows.clamp_min(0), grad), None, None
