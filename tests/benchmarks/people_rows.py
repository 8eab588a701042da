"""The rows of the benchmark on people: which layers lie below, and what each person has of their own on top."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from people_data import INNER, WIDTH
from people_grown import grown_pool
from people_methods import Lora, Masks, Vector, principal_pool, random_pool

PRIORS = [(variance, slope) for slope in (0.0, 0.1, 0.3) for variance in (0.1, 0.3, 1.0, 3.0)]
"""Variances of a person's offsets, and of the logarithm of the slope, that are tried."""


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        common: whether the LoRA that all share is merged into the base; None: no text is read.
        offset: whether a person's offset lies below what is trained.
        slope: of a row that is an offset: whether it has a slope as well.
        make: makes what is trained, from the number of people, a seed, and the pool if there is one.
        pool: makes the pool, from the bench.
        rates: learning rates of which people who are not held out choose one.
        few: of a row with few directions and a prior, adapters of the pool, or 0: real numbers instead of masks.
        fit: whether each direction has its own variance, fitted to people.
        once: of a row that is computed in one pass over the labels: whether its masks are drawn instead of chosen, or,
            of few directions, False.
    """

    common: bool | None = True
    offset: bool = True
    slope: bool = True
    make: Callable | None = None
    pool: Callable | None = None
    rates: tuple[float, ...] = (0.0,)
    few: int | None = None
    fit: bool = False
    once: bool | None = None


def masks(number, width, rates=(0.1,), zero=True, reads=WIDTH, **layers):
    return Row(
        make=partial(Masks, zero=zero),
        pool=lambda bench, part: random_pool(number, width, bench.seed, reads),
        rates=rates,
        **layers,
    )


def once(number, width, random):
    return Row(
        pool=lambda bench, part: random_pool(number, width, bench.seed),
        rates=(1.0,),  # none: the prior of the gain is chosen, as others choose a rate
        once=random,
    )


def principal(number, width, rates=(0.1,), **layers):
    return Row(
        make=partial(Masks, zero=True),
        pool=lambda bench, part: principal_pool(bench.tail(part, True), number, width, bench.seed),
        rates=rates,
        **layers,
    )


def others(**how):
    """Masks over a pool of other people's adapters, from zero."""

    def pool(bench, part):
        return grown_pool(bench, part, lambda number, width: random_pool(number, width, bench.seed), **how)

    return Row(make=partial(Masks, zero=True), pool=pool, rates=(0.1,))


OFFSETS = {
    "no text + offset": Row(common=None, slope=False),
    "base + offset": Row(common=False, slope=False),
    "common + offset": Row(slope=False),
    "common + offset, slope": Row(),
}
OFFSET_ROWS = tuple(OFFSETS)
OWN = "common + offset, slope + "
DIRECTIONS, VARIANCES = (1, 4, 8), (0.003, 0.01, 0.03)
"""Numbers of directions, and variances of their coefficients, that are tried."""
FEW = {
    "common + offset, slope + few masks, 32 adapters": Row(few=32),
    "common + offset, slope + few masks, 104 adapters": Row(few=104),
    "common + offset, slope + few masks, 104 adapters, fitted": Row(few=104, fit=True),
    "common + offset, slope + few numbers": Row(few=0),
    "common + offset, slope + few numbers, one step": Row(few=0, once=False),
}
ONE_PASS = {
    f"{OWN}masks 104 x 12, one pass": once(104, 12, random=False),
    f"{OWN}random masks 104 x 12, gain in one pass": once(104, 12, random=True),
}
ROWS = {
    **OFFSETS,
    **FEW,
    **ONE_PASS,
    f"{OWN}masks 104 x 12": masks(104, 12, zero=False),
    f"{OWN}masks 104 x 12 from zero": masks(104, 12),
    f"{OWN}masks 248 x 12 from zero": masks(248, 12),
    f"{OWN}masks 248 x 8 from zero, beside": masks(248, 8, reads=INNER),
    f"{OWN}masks 248 x 32, principal": principal(248, 32),
    f"{OWN}LoRA r=8": Row(make=Lora, rates=(3e-4, 1e-3)),
    f"{OWN}vector": Row(make=Vector, rates=(3e-3,)),
    "base + LoRA r=8": Row(common=False, offset=False, make=Lora, rates=(1e-3,)),
    "common + masks 104 x 12 from zero": masks(104, 12, offset=False),
    "base + masks 104 x 12 from zero": masks(104, 12, common=False, offset=False),
    f"{OWN}masks 104 x 3 from zero": masks(104, 3),
    f"{OWN}masks 104 x 48 from zero": masks(104, 48),
    f"{OWN}masks, others' adapters x 12": others(),
    f"{OWN}masks, others' adapters cut to x 3": others(width=3),
    f"{OWN}masks, others' adapters cut to x 3, centred": others(width=3, centred=True),
    f"{OWN}masks, others' adapters and 86 random x 12": others(more=86),
}
