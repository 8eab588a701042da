"""The model card of a saved pool."""

from __future__ import annotations

from ..core.files import dtype_name
from .random import RandomAdapters
from .trained import TrainedAdapters

_LISTED = 50


def model_card(adapters: RandomAdapters | TrainedAdapters) -> str:
    """Markdown: how to use the pool, what it is, where its adapters come from."""
    facts = [
        ("kind", adapters.kind),
        ("adapters per site", str(adapters.num_adapters)),
        ("bottleneck size", str(adapters.bottleneck_size)),
        ("dtype", dtype_name(adapters.dtype)),
        ("bytes of tensors", f"{adapters.nbytes:,}"),
        ("fingerprint", f"`{adapters.fingerprint}`"),
    ]
    if isinstance(adapters, RandomAdapters):
        facts.append(("seed", str(adapters.seed)))
        extra = ["The adapters are random and follow from the seed: there is no tensor file."]
        arguments = ""
    else:
        facts += [("sites", str(len(adapters.sites))), ("insertion form", adapters.insertion_form)]
        facts += [("activation", adapters.activation), ("layer norm", str(adapters.layer_norm).lower())]
        extra = ["## Sources", "", *_listed(adapters.sources), "", "## Sites", "", *_listed(adapters.target_modules)]
        arguments = (
            f",\n    insertion_form={adapters.insertion_form!r}, activation={adapters.activation!r}, "
            f"layer_norm={adapters.layer_norm}"
        )
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
        f"model = get_peft_model(base_model, peft_xmask.XPEFTConfig(pool=pool{arguments}))",
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


def _listed(names: tuple[str, ...] | list[str]) -> list[str]:
    more = [f"- and {len(names) - _LISTED} more"] if len(names) > _LISTED else []
    return [f"- {name}" for name in names[:_LISTED]] + more
