"""A method of the quality benchmark: a PEFT config, and the learning rate at which its search starts."""

from collections.abc import Callable
from dataclasses import dataclass, field

from peft import PeftConfig

from peft_xmask import XPEFTConfig
from peft_xmask.cli.classify import MakesOptimizer, adamw


def nothing(model):
    """Train what the config says."""


@dataclass(frozen=True)
class Method:
    """How a method is put on the base.

    Attributes:
        config: makes its PEFT config.
        start: learning rate at which the search starts.
        masks: whether the learning rate that is searched is that of X-PEFT's masks.
        prepare: what is done to the model beside it.
        optimizer: makes it from the head's group of parameters and the method's.
        warmup: share of the steps in which rates rise.
        search: whether the rate is searched; if not, it is ``start``.
        saves_more: whether its file has frozen numbers, which are no part of a profile, beside what is trained.
        payload: bytes of a profile, where its file has masks that nobody trained; None: as many as the file has.
    """

    config: Callable[[], PeftConfig]
    start: float = 3e-3
    masks: bool = False
    prepare: Callable[[object], None] = field(default=nothing)
    optimizer: MakesOptimizer = adamw
    warmup: float = 0.06
    search: bool = True
    saves_more: bool = False
    payload: int | None = None


def of(kind, task_type="SEQ_CLS", **settings):
    return lambda: kind(task_type=task_type, **settings)


TRAINING = ("prepare", "optimizer", "warmup", "search", "payload")
"""Of what an X-PEFT method is told, all that is not of its config."""


def xpeft(num_adapters=100, bottleneck_size=48, *, start=0.1, **settings):
    training = {name: settings.pop(name) for name in TRAINING if name in settings}
    made = of(XPEFTConfig, num_adapters=num_adapters, bottleneck_size=bottleneck_size, **settings)
    return Method(made, start=start, masks=True, **training)


def xpeft_of(pool, *arguments, start=0.1, search=True, payload=None, prepare=nothing, **settings):
    """X-PEFT over a pool that is made when it is first wanted."""

    def made():
        return XPEFTConfig(task_type="SEQ_CLS", pool=pool(*arguments), **settings)

    return Method(made, start=start, masks=True, search=search, payload=payload, prepare=prepare)


def k_hot(*sizes, **settings):
    """X-PEFT whose masks add what is chosen and leave out the rest; gains start at 0.3."""
    return xpeft(*sizes, **{"mask_weighting": "variance", "scale": 0.3, **settings})
