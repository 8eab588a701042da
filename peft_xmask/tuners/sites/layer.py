"""A base module with adapters beside or after it.

```
sequential:   y = module(x);  y + up act(down y)        parallel:   module(x) + up act(down x)
```
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...core.adapter import AdapterForm, AdapterPair, adapt
from ...core.lora import LinearChange, parallel_change, sequential_change
from ...errors import FileFormatError, MergeError, TargetError
from ..base.layer import TargetLayer
from ..base.mixed_batch import examples_by_name
from ..base.peft_private import check_adapters_to_merge
from .matrix import in_shape_of_weight, matrix_of, why_no_matrix
from .places import device_of, place_of


def _broken(adapter_name: str) -> str:
    """PEFT's own words first, which its users may look for."""
    return (
        f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken. This module was left as "
        "it was."
    )


class SiteLayer(TargetLayer):
    """Wraps one module. Subclasses say which adapters there are, and give each as a pair of matrices.

    Several active adapters add up, each reading the module's own input or output:
    ``y + sum_a up_a act(down_a y)``.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        place = place_of(self.get_base_layer())
        assert place is not None  # the tuner has checked every site
        self.in_features, self.out_features = place.in_features, place.out_features
        self._feature_axis = place.feature_axis
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._before_merge: tuple[Tensor, Tensor | None] | None = None

    @abstractmethod
    def form(self, adapter_name: str) -> AdapterForm | None:
        """How the adapter is applied here; None if the adapter is not at this site."""

    @abstractmethod
    def pair(self, adapter_name: str) -> AdapterPair:
        """The adapter's matrices, scale included."""

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The module's output with the active adapters added.

        Args:
            x: shape ``[..., in_features]``; of a convolution ``[..., in_features, *size]``, of an embedding any shape.
            adapter_names: one adapter name, or ``"__base__"``, for each example of the batch.

        Returns:
            shape ``[..., out_features]``, of a convolution ``[..., out_features, *size]``; the module's own dtype.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if not isinstance(y, Tensor):
            raise TargetError(
                f"Expected one tensor from the adapted {type(self.base_layer).__name__}, found a {type(y).__name__}. "
                "Add this module to exclude_modules."
            )
        if self.disable_adapters or self.merged:
            return y
        if adapter_names is not None:
            return self._forward_mixed(x, y, adapter_names)
        out = y
        for name in self.active_adapters:
            form = self.form(name)
            if form is not None:
                out = out + self._change(name, form, x, y)
        return out

    def _change(self, name: str, form: AdapterForm, x: Tensor, y: Tensor) -> Tensor:
        source = y if form.insertion_form == "sequential" else x
        if self._feature_axis != -1:
            # contiguous, because otherwise PyTorch's matmul computes differently if something requires a gradient
            source = source.movedim(self._feature_axis, -1).contiguous()
        pair = self.pair(name)
        if not torch.is_autocast_enabled(source.device.type):
            source = self._cast_input_dtype(source, pair.down.dtype)  # type: ignore[no-untyped-call]
        change = adapt(source, pair, activation=form.activation, layer_norm=form.layer_norm, dropout=self.dropout(name))
        return (change if self._feature_axis == -1 else change.movedim(-1, self._feature_axis)).to(y.dtype)

    def dropout(self, adapter_name: str) -> float:
        """Probability, at this moment, of zeroing an input of the adapter's up-projection."""
        return 0.0

    def _forward_mixed(self, x: Tensor, y: Tensor, adapter_names: list[str]) -> Tensor:
        out = y.clone()
        for name, rows in examples_by_name(adapter_names, x):
            form = self.form(name)
            if form is not None:
                out[rows] = y[rows] + self._change(name, form, x[rows], y[rows])
        return out

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As in PEFT, but never to the meta device, where there would be no values left."""
        if device is not None or device_of(self.get_base_layer()) is not None:
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    def why_not_linear(self, adapter_name: str) -> str | None:
        """Why the adapter is not a linear map of the module's input, or None if it is."""
        form = self.form(adapter_name)
        if form is None or form.linear:
            return None
        return (
            f"adapter '{adapter_name}' has activation={form.activation!r}, layer_norm={form.layer_norm}; only "
            'activation="identity" without layer_norm is a linear map. Use the adapter unmerged.'
        )

    def why_not_mergeable(self, adapter_names: list[str]) -> str | None:
        """Why these adapters cannot be merged into this module's weight, or None if they can."""
        names = [name for name in adapter_names if self.form(name) is not None]
        if names and (kind := self._why_no_matrix()):
            return f"it is {kind}. Use the adapter unmerged."
        base = self.get_base_layer()
        for name in names:
            if reason := self.why_not_linear(name):
                return reason
            if isinstance(base, nn.Embedding):
                continue  # a constant goes to every row
            if base.bias is None and self._change_to_merge(name).constant is not None:
                return f"adapter '{name}' has biases and the module has none to add them to. Use the adapter unmerged."
        return None

    def _why_no_matrix(self) -> str | None:
        base = self.get_base_layer()
        if base is not self.base_layer:
            return f"a {type(base).__name__} with a LoRA beneath the adapter"
        return why_no_matrix(base)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add linear adapters to the module's weight: ``W + up down`` (parallel) or ``W + up down W`` (sequential).

        W is the matrix of a linear layer, of a convolution or of an embedding, see :mod:`.matrix`.

        The old weight is kept until :meth:`unmerge`, which restores it bit for bit.

        Args:
            safe_merge: raise an error, before anything is changed, if the result is not finite.

        Raises:
            MergeError: the adapter is not linear, the base is quantised, a bias has nowhere to go, or, with
                ``safe_merge``, the result is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self.form(name) is not None]
        if not names:
            return
        if reason := self.why_not_mergeable(names):
            raise MergeError(f"Cannot merge: {reason}")
        weight, bias = self._weight_and_bias()
        original = self._before_merge or (weight, bias)
        for name in names:
            weight, bias = self._merged(name, weight, bias)
            if safe_merge and not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
                raise MergeError(f"{_broken(name)} Load or train the adapter again.")
        self._before_merge = original
        self._put_back(weight, bias)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restore the weight from before the merge, bit for bit."""
        if self._before_merge is not None:
            self._put_back(*self._before_merge)
        self._before_merge = None
        self.merged_adapters.clear()

    def _weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        base: Any = self.get_base_layer()
        bias = getattr(base, "bias", None)  # an embedding has none
        return base.weight.data, None if bias is None else bias.data

    def _put_back(self, weight: Tensor, bias: Tensor | None) -> None:
        base: Any = self.get_base_layer()
        base.weight.data = weight.to(base.weight.device)
        if bias is not None:
            base.bias.data = bias.to(base.bias.device)

    def linear_change(self, name: str) -> LinearChange:
        """What a linear adapter adds to the module's output, as a function of the module's input."""
        form, pair = self.form(name), self.pair(name)
        assert form is not None
        if form.insertion_form == "parallel":
            return parallel_change(pair)
        if kind := self._why_no_matrix():
            raise MergeError(
                f"Adapter '{name}' reads the output of {kind}, so it cannot be written as a map of the module's input. "
                'On a quantised or sharded linear layer use insertion_form="parallel", elsewhere the adapter as it is.'
            )
        weight, bias = self._before_merge or self._weight_and_bias()
        return sequential_change(pair, matrix_of(self.get_base_layer(), weight), bias)

    def _change_to_merge(self, name: str) -> LinearChange:
        try:
            return self.linear_change(name)
        except FileFormatError as error:  # masks of numbers that are not finite
            raise MergeError(f"{_broken(name)} {error}") from error

    def why_no_lora(self, adapter_name: str) -> str | None:
        """Why the adapter cannot be written as a LoRA of a linear layer, or None if it can."""
        if not isinstance(self.get_base_layer(), (nn.Linear, Conv1D)):
            return f"its module is no linear layer but {type(self.get_base_layer()).__name__}."
        return self.why_not_linear(adapter_name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's ``convert_to_lora`` can take this adapter: it is linear and adds no constant."""
        if self.form(adapter_name) is None or self.why_no_lora(adapter_name) or self._why_no_matrix():
            return False
        return self.linear_change(adapter_name).constant is None

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What a linear adapter adds to the module's weight, in the shape of that weight; its constant is left out.

        Raises:
            MergeError: the adapter is not linear, or reads the output of a module that is not.
        """
        if reason := self.why_not_linear(adapter_name):
            raise MergeError(f"Expected an adapter that is a change of the weight, found another one: {reason}")
        down, up, _ = self.linear_change(adapter_name)
        return in_shape_of_weight(self.get_base_layer(), up @ down)

    def _merged(self, name: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        down, up, constant = self._change_to_merge(name)
        delta = up @ down
        if constant is not None and isinstance(self.get_base_layer(), nn.Embedding):
            delta, constant = delta + constant.unsqueeze(1), None
        merged = (weight + in_shape_of_weight(self.get_base_layer(), delta).to(weight.device)).to(weight.dtype)
        return merged, bias if bias is None or constant is None else (bias + constant.to(bias.device)).to(bias.dtype)
