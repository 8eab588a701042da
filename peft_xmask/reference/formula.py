"""Formulas that can be printed and evaluated: no strings are executed.

``r * (d_in + d_out)`` is written with Python's operators on symbols, prints as that, and gives a number when the
symbols have values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Union

from ..errors import ConfigError

Operand = Union["Expression", int, float]


class Expression:
    """Something that has a value once its symbols have."""

    def value(self, values: Mapping[str, Any]) -> float:
        """The number.

        Raises:
            ConfigError: a symbol has no value.
        """
        raise NotImplementedError

    def symbols(self) -> set[str]:
        """Names of the symbols in it."""
        raise NotImplementedError

    def __add__(self, other: Operand) -> Expression:
        return Operation("+", self, as_expression(other))

    def __radd__(self, other: Operand) -> Expression:
        return as_expression(other) + self

    def __sub__(self, other: Operand) -> Expression:
        return Operation("-", self, as_expression(other))

    def __rsub__(self, other: Operand) -> Expression:
        return as_expression(other) - self

    def __mul__(self, other: Operand) -> Expression:
        return Operation("*", self, as_expression(other))

    def __rmul__(self, other: Operand) -> Expression:
        return as_expression(other) * self

    def __truediv__(self, other: Operand) -> Expression:
        return Operation("/", self, as_expression(other))


@dataclass(frozen=True)
class Number(Expression):
    """A constant."""

    number: float

    def value(self, values: Mapping[str, Any]) -> float:
        """The constant."""
        return self.number

    def symbols(self) -> set[str]:
        """None."""
        return set()

    def __str__(self) -> str:
        return f"{self.number:g}"


@dataclass(frozen=True)
class Symbol(Expression):
    """A name: a field of the config, a width of the site, or a size of the model."""

    name: str

    def value(self, values: Mapping[str, Any]) -> float:
        """What the name stands for; yes and no are 1 and 0."""
        found = values.get(self.name)
        if isinstance(found, (bool, int, float)):
            return found + 0
        raise ConfigError(f"The formula needs a number for '{self.name}', found {found!r}.")

    def symbols(self) -> set[str]:
        """Itself."""
        return {self.name}

    def __str__(self) -> str:
        return self.name


_OPERATIONS: dict[str, Callable[[float, float], float]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}
_BINDS = {"+": 1, "-": 1, "*": 2, "/": 2}


@dataclass(frozen=True)
class Operation(Expression):
    """Two expressions and ``+``, ``-``, ``*`` or ``/`` between them."""

    sign: str
    left: Expression
    right: Expression

    def value(self, values: Mapping[str, Any]) -> float:
        """The result; a factor of zero spares the other factor's symbols."""
        left = self.left.value(values)
        if self.sign == "*" and left == 0:
            return 0
        return _OPERATIONS[self.sign](left, self.right.value(values))

    def symbols(self) -> set[str]:
        """Those of both sides."""
        return self.left.symbols() | self.right.symbols()

    def __str__(self) -> str:
        left, right = str(self.left), str(self.right)
        if isinstance(self.left, Operation) and _BINDS[self.left.sign] < _BINDS[self.sign]:
            left = f"({left})"
        if isinstance(self.right, Operation) and (
            _BINDS[self.right.sign] < _BINDS[self.sign]
            or (self.sign in "-/" and _BINDS[self.right.sign] == _BINDS[self.sign])
        ):
            right = f"({right})"
        return f"{left} {self.sign} {right}" if self.sign in "+-" else f"{left}{self.sign}{right}"


@dataclass(frozen=True)
class Call(Expression):
    """A named function of expressions."""

    name: str
    function: Callable[..., float]
    arguments: tuple[Expression, ...]

    def value(self, values: Mapping[str, Any]) -> float:
        """The function's result."""
        return self.function(*(argument.value(values) for argument in self.arguments))

    def symbols(self) -> set[str]:
        """Those of its arguments."""
        return set().union(*(argument.symbols() for argument in self.arguments))

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.arguments))})"


def as_expression(operand: Operand) -> Expression:
    """A number as an expression; an expression as it is."""
    return operand if isinstance(operand, Expression) else Number(operand)


def symbols(names: str) -> tuple[Symbol, ...]:
    """Symbols by their names, apart by spaces."""
    return tuple(map(Symbol, names.split()))


def call(name: str, function: Callable[..., float], *arguments: Operand) -> Call:
    """A named function of expressions."""
    return Call(name, function, tuple(map(as_expression, arguments)))


def floor(operand: Operand) -> Call:
    """The whole part."""
    return call("floor", int, operand)


def nearest(operand: Operand) -> Call:
    """The nearest whole number, halves to the even one."""
    return call("round", round, operand)


def ceil(operand: Operand) -> Call:
    """The next whole number."""
    return call("ceil", lambda number: -int(-number // 1), operand)


def smaller(*operands: Operand) -> Call:
    """The smallest."""
    return call("min", min, *operands)


@dataclass(frozen=True)
class Formula:
    """A count over a model: something per site, something per group of sites, something once.

    Attributes:
        site: summed over the sites; may use ``d_in``, ``d_out``, ``bias`` (0 or 1) and ``numbers`` (parameters) of it.
        group: summed over the groups of sites that share numbers.
        once: added once; may use ``S`` (sites), ``d_in_max``, ``d_out_max`` and sizes of the model.
    """

    site: Expression = Number(0)
    group: Expression = Number(0)
    once: Expression = Number(0)

    def total(
        self, sites: Iterable[Mapping[str, Any]], groups: Iterable[Mapping[str, Any]], common: Mapping[str, Any]
    ) -> int:
        """The count.

        Args:
            sites: values of each site's symbols.
            groups: values of one site of each group.
            common: values of the config's and the model's symbols.
        """
        total = self.once.value(common) if self.once != Number(0) else 0
        total += sum(self.site.value({**common, **site}) for site in sites)
        if self.group != Number(0):
            total += sum(self.group.value({**common, **site}) for site in groups)
        return round(total)

    @property
    def shares(self) -> bool:
        """Whether a part of it is not per site."""
        return self.group != Number(0) or self.once != Number(0)

    def __str__(self) -> str:
        parts = []
        if self.site != Number(0):
            parts.append(f"{self.site} per site")
        if self.group != Number(0):
            parts.append(f"{self.group} per group of sites")
        if self.once != Number(0):
            parts.append(f"{self.once} once")
        return "; ".join(parts) or "0"


def per_site(expression: Operand, *, group: Operand = 0, once: Operand = 0) -> Formula:
    """A formula."""
    return Formula(as_expression(expression), as_expression(group), as_expression(once))


def once(expression: Operand) -> Formula:
    """A formula of something that is there once."""
    return Formula(once=as_expression(expression))


def times(factor: int, formula: Formula) -> Formula:
    """Every part of a formula times a whole number: bytes of numbers."""

    def scaled(part: Expression) -> Expression:
        return part if part == Number(0) else factor * part

    return Formula(scaled(formula.site), scaled(formula.group), scaled(formula.once))
