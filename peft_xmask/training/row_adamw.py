"""AdamW that moves the rows of a batch and no others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..tuners.base.state import lazy_zeros
from ..tuners.xpeft.table import find_table
from . import distributed as ranks

_MOMENTS = ("exp_avg", "exp_avg_sq")


class RowAdamW(torch.optim.Optimizer):
    """AdamW in which a row of a table takes a step only when the batch has it.

    Of a table of profiles, each row r that has a gradient, at its own step t_r:
    ``m_r <- b1 m_r + (1 - b1) g_r, v_r <- b2 v_r + (1 - b2) g_r^2,
    w_r <- (1 - lr decay) w_r - lr (m_r / (1 - b1^t_r)) / (sqrt(v_r / (1 - b2^t_r)) + eps)``.
    Other rows keep weight, moments and step as they are: neither momentum nor weight decay reaches them, and their
    moments take no memory. For any other parameter it is AdamW.

    The gradients of rows are in a list ``row_gradients`` of the table (:func:`peft_xmask.core.masks.pick_rows`), which
    :meth:`for_model` makes and :meth:`step` empties; its ``grad`` stays None. So the Trainer, which knows dense
    gradients only, neither clips nor counts them, and a gradient scaler (fp16) does not see them: train in float32 or
    bfloat16.

    In several processes every one takes the same step, with the sum of the gradients of all divided by their number, as
    DDP does it: rows that start the same stay the same, bit for bit. They are exchanged in :meth:`step`, once however
    many batches are accumulated, and only rows that some process had in its batches; DDP is told to leave the table
    alone.

    Args:
        params: parameters, or groups of them, as of any optimizer. :meth:`for_model` takes those of a model.
        lr: learning rate.
        betas: b1 and b2.
        eps: added to the root.
        weight_decay: decoupled, of the rows that step.

    Raises:
        ConfigError: a number is invalid.

    Source: AdamW (arXiv 1711.05101); steps of their own for rows are ours.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ConfigError(f"{name}={value!r} is invalid: expected a number of at least 0.")
        if not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"betas={betas!r} is invalid: expected two numbers from 0 up to, not including, 1.")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @classmethod
    def for_model(
        cls, model: nn.Module, *, lr: float = 1e-3, other_lr: float | None = None, **settings: Any
    ) -> RowAdamW:
        """An optimizer of all that is trained in a model, whose profiles from now on have gradients by row.

        Args:
            lr: learning rate of the profiles.
            other_lr: of everything else, such as a head; None: ``lr``.
            settings: those of the class.

        Raises:
            ConfigError: the model has no X-PEFT adapter, or none that is trained.
        """
        table = find_table(model)
        hide_rows(model)
        trained = [name for name, holder in table.xpeft_logits.items() if holder.weight.requires_grad]
        if not trained:
            raise ConfigError("Expected a model with an X-PEFT adapter that is trained, found none.")
        rows = [parameter for parameter in table.parameters() if parameter.requires_grad]
        for parameter in rows:
            parameter.row_gradients = []  # type: ignore[attr-defined]
        others = [p for p in model.parameters() if p.requires_grad and all(p is not row for row in rows)]
        groups: list[dict[str, Any]] = [
            {"params": rows},
            {"params": others, "lr": lr if other_lr is None else other_lr},
        ]
        return cls([group for group in groups if group["params"]], lr=lr, **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take a step.

        Args:
            closure: computes the loss again, as of any optimizer.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                gradients = getattr(parameter, "row_gradients", None)
                others = gradients is not None and parameter.grad is None and ranks.count() > 1
                if gradients or others:
                    self._step_rows(parameter, group)
                elif parameter.grad is not None:
                    self._step_whole(parameter, group)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, those of rows too."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for parameter in group["params"]:
                getattr(parameter, "row_gradients", []).clear()

    def _step_rows(self, parameter: Tensor, group: dict[str, Any]) -> None:
        rows, values = _summed(parameter)
        parameter.row_gradients.clear()  # type: ignore[attr-defined]
        if ranks.count() > 1:
            rows, values = ranks.mean_rows(rows, values)
        if not len(rows):
            return
        state = self.state[parameter]
        if not state:
            state.update(self._empty(parameter))
        steps = state["step"][rows] + 1
        moments = [state[name][rows] for name in _MOMENTS]
        moved = _adamw(parameter[rows], values, moments, steps.unsqueeze(1), group)
        for target, new in ((parameter, moved), *((state[n], m) for n, m in zip(_MOMENTS, moments, strict=True))):
            target.index_copy_(0, rows, new)
        state["step"].index_copy_(0, rows, steps)

    def _step_whole(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.int64)
            state.update({name: torch.zeros_like(parameter) for name in _MOMENTS})
        state["step"] += 1
        moments = [state[name] for name in _MOMENTS]
        parameter.copy_(_adamw(parameter, parameter.grad, moments, state["step"], group))

    @staticmethod
    def _empty(parameter: Tensor) -> dict[str, Tensor]:
        device = parameter.device
        moments = {name: lazy_zeros(*parameter.shape, dtype=parameter.dtype, device=device) for name in _MOMENTS}
        return {"step": lazy_zeros(len(parameter), dtype=torch.int64, device=device), **moments}

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer; of a table, only the rows that ever took a step.

        Their ``step`` is ``[2, R]``: which rows, and how many steps each took.
        """
        found: dict[str, Any] = super().state_dict()
        found["state"] = {key: _compact(state) for key, state in found["state"].items()}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave."""
        super().load_state_dict(state_dict)
        for parameter, compact in list(self.state.items()):
            if compact and compact["step"].dim() == 2:
                rows, steps = compact["step"].to(parameter.device)
                self.state[parameter] = state = self._empty(parameter)
                state["step"].index_copy_(0, rows, steps)
                for name in _MOMENTS:
                    state[name].index_copy_(0, rows, compact[name])


def hide_rows(model: nn.Module) -> None:
    """Keep DDP from sending a model's mask table: its rows have no ``grad``, and are very many."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    names = [name for name, _ in tensors if ".mask_table." in f".{name}"]
    hidden = [*getattr(model, "_ddp_params_and_buffers_to_ignore", []), *names]
    model._ddp_params_and_buffers_to_ignore = hidden  # type: ignore[assignment]


def _summed(parameter: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows and the sum of the gradients of each."""
    gradients: list[tuple[Tensor, Tensor]] = parameter.row_gradients  # type: ignore[attr-defined]
    if not gradients:
        return torch.empty(0, dtype=torch.long, device=parameter.device), parameter.new_empty(0, *parameter.shape[1:])
    rows, place = torch.unique(torch.cat([each for each, _ in gradients]), return_inverse=True)
    values = torch.cat([each for _, each in gradients])
    return rows, values.new_zeros(len(rows), *values.shape[1:]).index_add_(0, place, values)


def _adamw(weight: Tensor, gradient: Tensor, moments: list[Tensor], steps: Tensor, group: dict[str, Any]) -> Tensor:
    """The weight after a step; the moments are changed in place."""
    first, second = group["betas"]
    mean, square = moments
    mean.lerp_(gradient, 1 - first)
    square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
    steps = steps.to(weight.device, torch.float64)
    rate = (group["lr"] / (1 - first**steps)).to(weight.dtype)
    root = square.sqrt() / (1 - second**steps).sqrt().to(weight.dtype) + group["eps"]
    moved: Tensor = weight * (1 - group["lr"] * group["weight_decay"]) - rate * mean / root
    return moved


def _compact(state: dict[str, Any]) -> dict[str, Any]:
    if not state or state["step"].dim() != 1:
        return state
    rows = state["step"].nonzero().view(-1)
    return {"step": torch.stack([rows, state["step"][rows]]), **{name: state[name][rows] for name in _MOMENTS}}
