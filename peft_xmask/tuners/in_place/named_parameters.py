"""Parameters that a config names itself (``target_parameters``), such as those of fused experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ...errors import TargetError
from ..base.peft_private import BaseTunerLayer


def named_parameters_of(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[nn.Module, list[str]]]:
    """The modules with these parameters, and the parameters' names there, by the module's name and in its order.

    A name matches as in PEFT: the parameter's full name, or the end of it behind a dot.

    Raises:
        TargetError: a name matches no parameter, or one that this method cannot adapt.
    """
    found: dict[str, tuple[nn.Module, list[str]]] = {}
    missing = set(names)
    for name, module in _base_modules(model):
        for parameter in (*module._parameters, *getattr(module, "parametrizations", {})):
            full = f"{name}.{parameter}" if name else parameter
            matched = {each for each in names if full == each or full.endswith(f".{each}")}
            if matched and getattr(module, parameter) is not None:
                missing -= matched
                _refuse(name, module, parameter)
                found.setdefault(name, (module, []))[1].append(parameter)
    if missing:
        raise TargetError(_not_found(model, sorted(missing)[0]))
    return found


def _base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The base's own modules by name: without what adapters have put into them."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside or ("\0",)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{name}.")
            if hasattr(module, "base_layer"):
                yield name, module.get_base_layer()
        else:
            yield name, module


def _refuse(name: str, module: nn.Module, parameter: str) -> None:
    """Reject parameters whose module cannot stand for them.

    Raises:
        TargetError: of the model itself, of a module around others with parameters, or not of floating point numbers.
    """
    if not name:
        raise TargetError(
            f"'{parameter}' is a parameter of the {type(module).__name__} itself: the module that holds an adapted "
            "parameter is replaced, and the model cannot be. Put the model into another module."
        )
    if inner := next((each for child in module.children() for each, _ in child.named_parameters()), None):
        raise TargetError(
            f"'{parameter}' belongs to '{name}', a {type(module).__name__} around modules with parameters of their own "
            f"('{inner}'), and the module that holds an adapted parameter is replaced. Only parameters of modules "
            "without such modules inside can be named, such as those of fused experts."
        )
    if not torch.is_floating_point(getattr(module, parameter)) and parameter != "weight":
        raise TargetError(
            f"'{name}.{parameter}' is quantised ({getattr(module, parameter).dtype}): nothing can be added to it. Take "
            "it out of target_parameters, or load the base unquantised."
        )


def _not_found(model: nn.Module, wanted: str) -> str:
    """What to say of a name that matches nothing."""
    modules = {name for name, _ in _base_modules(model)}
    if any(name == wanted or name.endswith(f".{wanted}") for name in modules):
        return f"target_parameters: '{wanted}' is a module, not a parameter. Name it in target_modules."
    last = wanted.rpartition(".")[2]
    alike = [
        f"{name}.{parameter}"
        for name, module in _base_modules(model)
        for parameter in module._parameters
        if parameter == last
    ]
    like = f" Alike: '{alike[0]}'." if alike else ""
    return (
        f"target_parameters: no parameter of the {type(model).__name__} is called '{wanted}', or ends in '.{wanted}'."
        f"{like} model.named_parameters() lists them."
    )
