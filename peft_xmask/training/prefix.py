"""What comes before the first adapted block of a model, computed once for examples that are seen again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..tuners.base.peft_private import BaseTunerLayer


@dataclass(frozen=True)
class Prefix:
    """The blocks of a model that come before its first adapted one.

    Attributes:
        blocks: run one after another, each on the output of the one before.
        rest: the blocks after them.
    """

    blocks: tuple[nn.Module, ...]
    rest: tuple[nn.Module, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Prefix | None:
        """The longest list of blocks (an ``nn.ModuleList``) in a model, up to the first block with an adapter.

        None if there is no such list, if its first block is adapted, or if anything outside the list is adapted.
        """
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
        if not lists:
            return None
        blocks = max((list(each) for each in lists), key=lambda each: sum(map(_size, each)))
        adapted = [_is_adapted(block) for block in blocks]
        sites = sum(map(_is_site, model.modules()))
        inside = sum(_is_site(module) for module in itertools.chain.from_iterable(block.modules() for block in blocks))
        if True not in adapted or not adapted.index(True) or sites != inside:
            return None
        first = adapted.index(True)
        return cls(tuple(blocks[:first]), tuple(blocks[first:]))

    def record(
        self, model: nn.Module, batch: Mapping[str, Any], *, skip: bool = False, gradient: bool = False
    ) -> Tensor | None:
        """The hidden states after the prefix, ``[B, T, d]``, of a forward pass in the mode the model is in.

        Args:
            model: the model of the blocks.
            batch: what its forward pass takes.
            skip: leave out the other blocks. Not in a model's first pass, in which adapters check that they are called.
            gradient: whether autograd records the pass, so that ``requires_grad`` of the states says whether anything
                that they depend on is trained.

        Returns:
            None if the blocks return anything but hidden states, which then cannot be replayed.
        """
        found: list[Any] = []
        hook = self.blocks[-1].register_forward_hook(lambda *parts: found.append(parts[-1]))
        try:
            rest = self.rest if skip else ()
            with torch.set_grad_enabled(gradient), _replaced(rest, [_skipped(each, found) for each in rest]):
                model(**batch)
        finally:
            hook.remove()
        return found[0] if len(found) == 1 and isinstance(found[0], Tensor) else None

    @contextmanager
    def replayed(self, states: Tensor | None) -> Iterator[None]:
        """Within it, a forward pass of the same examples takes these states and skips the prefix.

        What comes before the blocks, such as embeddings, still runs.

        Args:
            states: None: nothing is skipped.
        """
        if states is None:
            yield
            return
        with _replaced(self.blocks, [lambda *_, **__: states] * len(self.blocks)):
            yield


def _skipped(block: nn.Module, found: list[Any]) -> Callable[..., Any]:
    """A forward function that hands its input on, if blocks of this model take and give hidden states alone."""
    own = block.forward

    def forward(*args: Any, **named: Any) -> Any:
        alone = bool(args) and isinstance(args[0], Tensor) and isinstance(found[0], Tensor)
        return args[0] if alone else own(*args, **named)

    return forward


@contextmanager
def _replaced(blocks: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Within it, blocks have other forward functions."""
    kept = [vars(block).get("forward") for block in blocks]
    for block, forward in zip(blocks, forwards, strict=True):
        block.forward = forward
    try:
        yield
    finally:
        for block, own in zip(blocks, kept, strict=True):
            del block.forward
            if own is not None:
                block.forward = own


def _size(module: nn.Module) -> int:
    return len(list(module.modules()))


def _is_site(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer) and getattr(module, "base_layer", None) is not None


def _is_adapted(block: nn.Module) -> bool:
    return any(_is_site(module) for module in block.modules())
