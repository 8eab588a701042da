"""One copy of each pool tensor per process, for as long as something uses it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar
from weakref import WeakValueDictionary

from torch import Tensor

Key = TypeVar("Key", bound=Hashable)

_HELD: WeakValueDictionary[Hashable, Tensor] = WeakValueDictionary()


def hold(keys: Sequence[Key], make: Callable[[list[Key]], Sequence[Tensor]]) -> list[Tensor]:
    """Tensors for ``keys``: those that some model still uses, and new ones for the rest.

    Nothing is kept alive here; a tensor goes when the last module or pool that refers to it goes.

    Args:
        keys: each says everything that decides the tensor's numbers and dtype.
        make: called once with the keys that nobody holds, if there are any.

    Returns:
        One tensor for each key, in order.
    """
    found = {key: tensor for key in keys if (tensor := _HELD.get(key)) is not None}
    missing = [key for key in dict.fromkeys(keys) if key not in found]
    if missing:
        made = dict(zip(missing, make(missing), strict=True))
        for key, tensor in made.items():
            _HELD[key] = found[key] = tensor
    return [found[key] for key in keys]
