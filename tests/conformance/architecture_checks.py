"""What becomes of a tiny model of each architecture when it is adapted; as a script, writes docs/architectures.md.

python tests/conformance/architecture_checks.py
"""

from __future__ import annotations

import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from methods import METHODS, Method
from zoo import ZOO, Kind

from peft_xmask.errors import PeftXMaskError
from peft_xmask.tuners.base.layer import TargetLayer

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
CHECKED = [method for method in METHODS if method.name in ("xpeft", "bottleneck", "magnitude-mask", "weight-adapter")]
BEGIN, END = "<!-- table, made by tests/conformance/architecture_checks.py -->", "<!-- end of table -->"


@dataclass(frozen=True)
class Findings:
    """What was found of one architecture, method and choice of targets.

    Attributes:
        refused: why the method cannot be used; then the rest is empty.
        adapted: kinds of modules: their names, with ``#`` for each index.
        still_in_train, still_in_eval: kinds whose adapter alone leaves the output as it was.
        reload_exact: whether the saved and loaded adapter gives the same output, bit for bit.
        merge_exact: whether the merged adapter does; None: the adapter cannot be merged.
    """

    refused: str = ""
    adapted: tuple[str, ...] = ()
    still_in_train: tuple[str, ...] = ()
    still_in_eval: tuple[str, ...] = ()
    reload_exact: bool = False
    merge_exact: bool | None = None


def find(kind: Kind, method: Method, targets: str | None) -> Findings:
    """Adapt a model of this architecture and look."""
    try:
        model = _adapted(kind, method, targets)
    except PeftXMaskError as error:
        return Findings(refused=str(error))
    layers: dict[str, TargetLayer] = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, TargetLayer):
            kind_of_module = ".".join("#" if part.isdigit() else part for part in name.split("."))
            layers.setdefault(kind_of_module, module)
    batch = kind.batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of modules that are not called
        before = _outputs(model, batch)
    still = {}
    for mode in ("train", "eval"):
        model.train(mode == "train")
        still[mode] = tuple(name for name, layer in layers.items() if not _moves(model, layer, batch))
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(kind.build(), folder).eval()
    merged = None
    if method.linear:
        model.merge_adapter()
        merged = _same(_outputs(model, batch), before)
    reload_exact = _same(_outputs(loaded, batch), before)
    return Findings("", tuple(sorted(layers)), still["train"], still["eval"], reload_exact, merged)


def _adapted(kind: Kind, method: Method, targets: str | None) -> PeftModel:
    base = kind.build()
    torch.manual_seed(1)
    return get_peft_model(base, method.config(target_modules=targets)).eval()


def _moves(model: PeftModel, layer: TargetLayer, batch: dict[str, Tensor]) -> bool:
    """Whether the adapter of this layer, alone, changes the output."""
    model.base_model.disable_adapter_layers()
    without = _outputs(model, batch)
    layer.enable_adapters(True)
    found = _outputs(model, batch)
    model.base_model.enable_adapter_layers()
    return not _same(found, without)


def _outputs(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    torch.manual_seed(3)  # for dropout in training mode
    with torch.set_grad_enabled(model.training):
        return [each.detach() for each in _tensors(model(**batch))]


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from _tensors(tuple(output.values()))
    elif isinstance(output, (tuple, list)):
        for each in output:
            yield from _tensors(each)


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def row(kind: Kind) -> str:
    """The line of the table for one architecture."""
    default = {method.name: find(kind, method, None) for method in CHECKED}
    everything = {method.name: find(kind, method, "all-linear") for method in CHECKED}
    cells = [f"`{kind.name}`", *(_names(default[name]) for name in ("xpeft", "weight-adapter", "magnitude-mask"))]
    used = [each for found in (default, everything) for each in found.values() if not each.refused]
    merged = [each.merge_exact for each in used if each.merge_exact is not None]
    cells += [
        _yes(not any(each.still_in_train or each.still_in_eval for each in used)),
        _yes(all(each.reload_exact for each in used)),
        _yes(all(merged)),
    ]
    return f"| {' | '.join(cells)} |"


def _names(findings: Findings) -> str:
    """Kinds of modules without what they share, the blocks."""
    if findings.refused:
        return "refused"
    short: dict[str, list[str]] = {}
    for name in findings.adapted:
        parts = name.split(".")
        block = max((i for i, part in enumerate(parts) if part == "#"), default=-1)
        path = ".".join(parts[block + 1 :])
        parent, _, last = path.rpartition(".")
        short.setdefault(parent, []).append(last)
    return "<br>".join(
        f"`{parent + '.' if parent else ''}{{{','.join(dict.fromkeys(names))}}}`"
        if len(set(names)) > 1
        else f"`{parent + '.' if parent else ''}{names[0]}`"
        for parent, names in short.items()
    )


def _yes(found: bool) -> str:
    return "yes" if found else "no"


def table() -> str:
    """The table of docs/architectures.md."""
    head = ["architecture", "X-PEFT, bottleneck", "weight adapter", "magnitude mask"]
    head += ["moved in train and eval", "reload bit-exact", "merge exact"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *(row(kind) for kind in ZOO)]
    return "\n".join([BEGIN, *lines, END])


def main() -> None:
    """Replace the table in the page."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: table(), text, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
