"""Which modules hold a parameter: more than one where weights are tied."""

from __future__ import annotations

import re
from collections import defaultdict

from torch import Tensor, nn


class Owners:
    """The modules of a model that hold each of its parameters.

    Args:
        model: read once; modules added later are not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names: dict[int, list[str]] = defaultdict(list)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names[id(parameter)].append(re.sub(r"(\.base_layer)*\.\w+$", "", name))

    def besides(self, module_name: str, parameter: Tensor) -> list[str]:
        """Sorted names of the other modules that hold a parameter of this module.

        An adapted module goes by the name that it had before it was wrapped.
        """
        return sorted(name for name in self._names[id(parameter)] if name != module_name)
