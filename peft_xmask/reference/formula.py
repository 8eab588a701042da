"""Counts over a model as sympy expressions: they print in the docs and are evaluated for a real model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
from sympy.utilities.lambdify import implemented_function

from ..errors import ConfigError

nearest = implemented_function("round", round)
"""The nearest integer; halves go to the even one, as in Python."""


def symbols(names: str) -> tuple[sympy.Symbol, ...]:
    """Symbols from their names, separated by spaces; always a tuple."""
    return tuple(map(sympy.Symbol, names.split()))


def evaluate(expression: sympy.Expr, values: Mapping[str, Any]) -> float:
    """The value of an expression.

    A symbol that is multiplied by zero needs no value: ``soft * N`` is 0 where ``soft`` is False.

    Args:
        expression: built from :func:`symbols`.
        values: by symbol name; True and False count as 1 and 0.

    Raises:
        ConfigError: a symbol has no numeric value.
    """
    numbers = {name: value + 0 for name, value in values.items() if isinstance(value, (bool, int, float))}
    used, function = _compiled(expression, frozenset(name for name, number in numbers.items() if number == 0))
    missing = [name for name in used if name not in numbers]
    if missing:
        raise ConfigError(
            f"The formula {expression} needs a number for '{missing[0]}', found {values.get(missing[0])!r}."
        )
    return function(*(numbers[name] for name in used))


@lru_cache(maxsize=1024)
def _compiled(expression: sympy.Expr, zeros: frozenset[str]) -> tuple[tuple[str, ...], Callable[..., float]]:
    """Names of the symbols left after zeros are filled in, and a Python function of them."""
    rest = expression.subs({symbol: 0 for symbol in expression.free_symbols if symbol.name in zeros})
    used = sorted(rest.free_symbols, key=lambda symbol: symbol.name)
    return tuple(symbol.name for symbol in used), sympy.lambdify(used, rest, modules="math")


@dataclass(frozen=True)
class Formula:
    """A count over a model, in three parts.

    Attributes:
        site: summed over the sites; may use a site's ``d_in``, ``d_out``, ``bias`` (0 or 1) and ``parameters``.
        group: summed over the groups of sites that share parameters.
        once: added once; may use ``S`` (sites), ``d_in_max``, ``d_out_max`` and sizes of the model.
    """

    site: sympy.Expr = sympy.S.Zero
    group: sympy.Expr = sympy.S.Zero
    once: sympy.Expr = sympy.S.Zero

    def total(
        self, sites: Iterable[Mapping[str, Any]], groups: Iterable[Mapping[str, Any]], common: Mapping[str, Any]
    ) -> int:
        """The count.

        Args:
            sites: values of each site's symbols.
            groups: values of one site of each group.
            common: values of the config's and the model's symbols.
        """
        total = evaluate(self.once, common)
        total += sum(evaluate(self.site, {**common, **site}) for site in sites)
        total += sum(evaluate(self.group, {**common, **site}) for site in groups)
        return round(total)

    def __rmul__(self, factor: int) -> Formula:
        return Formula(factor * self.site, factor * self.group, factor * self.once)

    def __str__(self) -> str:
        parts = ((self.site, "per site"), (self.group, "per group of sites"), (self.once, "once"))
        return "; ".join(f"{part} {unit}" for part, unit in parts if part != 0) or "0"


def per_site(expression: Any, *, group: Any = 0, once: Any = 0) -> Formula:
    """A formula counted per site, with optional parts per group of sites and for the whole model."""
    return Formula(*map(sympy.sympify, (expression, group, once)))


def once(expression: Any) -> Formula:
    """A formula counted once for the whole model."""
    return Formula(once=sympy.sympify(expression))
