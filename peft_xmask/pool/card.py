"""The model card of a saved pool."""

from __future__ import annotations

from ..core.files import dtype_name
from .common import CommonPart
from .directions import Fitting
from .random import RandomAdapters
from .trained import TrainedAdapters

_LISTED = 50


def model_card(
    adapters: RandomAdapters | TrainedAdapters, common: CommonPart | None = None, fitting: Fitting | None = None
) -> str:
    """Markdown: how to use the pool, what it is, where its adapters come from."""
    own = adapters.fingerprint
    facts = [
        ("kind", adapters.kind),
        ("adapters per site", str(adapters.num_adapters)),
        ("bottleneck size", str(adapters.bottleneck_size)),
        ("dtype", dtype_name(adapters.dtype)),
        ("bytes of tensors", f"{adapters.nbytes + (0 if common is None else common.adapter.nbytes):,}"),
        ("fingerprint", f"`{own if common is None else common.fingerprint_around(own)}`"),
    ]
    if common is not None:
        place = "inside: masks mix deviations from it" if common.inside else "beside the mix"
        facts.append(("common part", f"{common.source}, bottleneck {common.adapter.bottleneck_size}, {place}"))
    if isinstance(adapters, RandomAdapters):
        facts.append(("seed", str(adapters.seed)))
        extra = ["The adapters are random and follow from the seed: there is no tensor file."]
    else:
        facts += [("sites", str(len(adapters.sites))), ("insertion form", adapters.insertion_form)]
        facts += [("activation", adapters.activation), ("layer norm", str(adapters.layer_norm).lower())]
        extra = ["## Sites", "", *_listed(adapters.target_modules)]
        if fitting is None:
            extra = ["## Sources", "", *_listed(adapters.sources), "", *extra]
        else:
            told = [f"| {name.replace('_', ' ')} | {_shown(value)} |" for name, value in fitting.facts.items()]
            extra = ["## Fitted to", "", "| | |", "| --- | --- |", *told, "", *extra]
    lines = [
        "---",
        "library_name: peft",
        "tags:",
        "- peft",
        "- x-peft",
        "---",
        "",
        "```python",
        "import peft_xmask",
        "from peft import get_peft_model",
        "",
        'pool = peft_xmask.AdapterPool.from_pretrained("path-or-hub-id-of-this-pool")',
        "model = get_peft_model(base_model, peft_xmask.XPEFTConfig(pool=pool))",
        "```",
        "",
        "# Adapter pool",
        "",
        "Frozen adapters for [X-PEFT](https://arxiv.org/abs/2401.16137). "
        "A profile of a few hundred bytes mixes some of them.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in facts),
        "",
        *extra,
    ]
    return "\n".join(lines) + "\n"


def _shown(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _listed(names: tuple[str, ...] | list[str]) -> list[str]:
    more = [f"- and {len(names) - _LISTED} more"] if len(names) > _LISTED else []
    return [f"- {name}" for name in names[:_LISTED]] + more
