"""The floors of the house: who may import whom. docs/design.md shows the same picture."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import peft_xmask

ROOT = Path(peft_xmask.__file__).parent

FLOORS = ("errors", "core", "pool", "tuners", "bank", "training", "people", "cli")
"""From the ground up. A module imports from its own floor and from those below."""

BESIDE = {"integrations": "training", "reference": "tuners"}
"""Folders beside the stairs, and the highest floor that each may import."""

TUNER_WINGS = ("xpeft", "bottleneck", "magnitude_mask", "weight_adapter")
"""The methods: none imports another."""

DOORS = {("pool", "pool"): {("training", "fit_pool")}, ("bank", "bank"): {("training", "learn")}}
"""Modules that may, inside a function, import a module above: a method whose work is done there."""

FACE = ("", "profiles", "__main__")
"""The package's root and its facade: they import names, and nothing imports them but the command line."""


def modules() -> Iterator[tuple[tuple[str, ...], bool, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        package = parts[-1] == "__init__"
        yield (parts[:-1] if package else parts), package, ast.parse(path.read_text(encoding="utf-8"))


def imports_of(module: tuple[str, ...], package: bool, tree: ast.Module, at_import: bool) -> Iterator[tuple[str, ...]]:
    """Modules of ours that a module imports, as parts below the root; those inside functions only on request."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in nodes:
        if at_import and id(node) in inside:
            continue
        above = node.level - 1 if package else node.level
        base = module[: len(module) - above]
        named = (*base, *(node.module.split(".") if node.module else ()))
        for alias in node.names:
            inner = (*named, alias.name)
            yield (
                inner if ROOT.joinpath(*inner).is_dir() or ROOT.joinpath(*inner).with_suffix(".py").is_file() else named
            )


def floor(name: str) -> int:
    return FLOORS.index(BESIDE.get(name, name))


@pytest.mark.parametrize("at_import", [True, False], ids=["at import", "inside functions too"])
def test_imports_point_down(at_import: bool):
    wrong = []
    for module, package, tree in modules():
        here = module[0] if module else ""
        if here in (*FACE, "_version"):
            continue
        for target in imports_of(module, package, tree, at_import):
            there = target[0] if target else ""
            if there in (here, "_version", "errors"):
                continue
            if there in FACE:
                if here != "cli":
                    wrong.append((".".join(module), ".".join(target)))
            elif floor(there) > floor(here) and (at_import or target not in DOORS.get(module, ())):
                wrong.append((".".join(module), ".".join(target)))
    assert not wrong


def test_no_method_imports_another():
    wrong = [
        (".".join(module), ".".join(target))
        for module, package, tree in modules()
        if module[:1] == ("tuners",) and len(module) > 1
        for target in imports_of(module, package, tree, at_import=False)
        if target[:1] == ("tuners",) and len(target) > 1 and target[1] in TUNER_WINGS and target[1] != module[1]
    ]
    assert not wrong


def test_no_circles_between_modules():
    graph: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for module, package, tree in modules():
        found = {target for target in imports_of(module, package, tree, at_import=True) if target != module}
        graph[module] = {target for target in found if not package or target[: len(module)] != module}
    done: set[tuple[str, ...]] = set()

    def visit(module: tuple[str, ...], path: list[tuple[str, ...]]) -> None:
        assert module not in path, " -> ".join(".".join(each) or "peft_xmask" for each in [*path, module])
        if module in done:
            return
        for target in graph.get(module, set()):
            visit(target, [*path, module])
        done.add(module)

    for module in graph:
        visit(module, [])
