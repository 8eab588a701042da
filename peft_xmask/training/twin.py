"""A model that shares another one's weights."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftModel
from torch import nn


def sharing_weights(model: nn.Module) -> nn.Module:
    """The base of a model with modules of its own and the same weights in memory, none of which has gradients.

    An adapter that is put on it, or a head that PEFT copies in order to train it, does not reach the original.
    """
    shared: dict[int, Any] = {id(each): nn.Parameter(each.detach(), requires_grad=False) for each in model.parameters()}
    shared.update({id(each): each for each in model.buffers()})
    twin: Any = copy.deepcopy(model, shared)
    base: nn.Module = twin.unload() if isinstance(twin, PeftModel) else twin
    return base
