"""Find the modules that an adapter touches, and the part of the model each belongs to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..tuners.base.experts import is_fused_experts
from ..tuners.base.peft_private import BaseTunerLayer
from ..tuners.in_place.layer import InPlaceLayer
from ..tuners.in_place.rows import as_rows, rows_of
from .vocabulary import Workspace

_Q, _K, _V = Workspace.ATTENTION_QUERY, Workspace.ATTENTION_KEY, Workspace.ATTENTION_VALUE
_PLACES: tuple[tuple[str, tuple[Workspace, ...]], ...] = (
    (r"norm|(^|\.)ln_|layer_?norm", (Workspace.NORMALISATION,)),
    (r"lm_head|classifier|(^|\.)score$|pooler|qa_outputs|(^|\.)head$", (Workspace.HEAD,)),
    (r"embed|(^|\.)wte$|(^|\.)wpe$|(^|\.)shared$", (Workspace.EMBEDDING,)),
    (r"c_attn|qkv|query_key_value|in_proj|W_pack", (_Q, _K, _V)),
    (r"(^|\.)(q_proj|q|query|q_lin|wq)$", (_Q,)),
    (r"(^|\.)(k_proj|k|key|k_lin|wk)$", (_K,)),
    (r"(^|\.)(v_proj|v|value|v_lin|wv)$", (_V,)),
    (r"(attn|[Aa]ttention)[^.]*(\.\w+)*\.(o_proj|o|dense|c_proj|out_proj|out_lin|wo)$", (Workspace.ATTENTION_OUTPUT,)),
    (r"(^|\.)(self_attn|attn|attention|SelfAttention|EncDecAttention)$", (Workspace.ATTENTION,)),
    (r"(^|\.)(up_proj|gate_proj|gate_up_proj|c_fc|fc1|fc_in|wi|wi_0|wi_1|lin1|dense_h_to_4h|intermediate\.dense)$",
     (Workspace.FFN_INTERMEDIATE,)),
    (r"(^|\.)(down_proj|fc2|fc_out|wo|lin2|dense_4h_to_h|output\.dense|mlp\.c_proj)$", (Workspace.FFN_OUTPUT,)),
    (r"(^|\.)experts$", (Workspace.FFN_INTERMEDIATE, Workspace.FFN_OUTPUT)),
    (r"(^|\.)(layers|layer|h|block|blocks)\.\d+$", (Workspace.BLOCK,)),
)  # fmt: skip


def workspace_of(name: str) -> tuple[Workspace, ...]:
    """The parts of a transformer that a module's name stands for; a fused projection stands for several."""
    return next((places for pattern, places in _PLACES if re.search(pattern, name)), (Workspace.OTHER,))


@dataclass(frozen=True)
class AdaptedSite:
    """A module of the base model that an adapter touches.

    Attributes:
        name: the module's name in the base model.
        module: the PEFT layer around it.
        d_in, d_out: input and output width of the host; a norm's width twice; an embedding's rows and columns.
        bias: whether the host has a bias.
        parameters: number of parameters of the host.
        names: number of names under which the model holds the module; more than 1 if it is tied.
        matrices: outputs and width of each parameter that is adapted in its own right, such as those of fused experts;
            empty where the host is adapted as a whole.
    """

    name: str
    module: nn.Module
    d_in: int
    d_out: int
    bias: bool
    parameters: int
    names: int = 1
    matrices: tuple[tuple[int, int], ...] = ()

    @property
    def workspace(self) -> tuple[Workspace, ...]:
        """The part of the model that the host belongs to."""
        return workspace_of(self.name)

    @property
    def layer(self) -> str | None:
        """The block it is in: its name up to the index."""
        found = re.match(r"(.*?\.?(?:layers|layer|h|block|blocks)\.\d+)(?:\.|$)", self.name)
        return found.group(1) if found else None


def adapted_sites(model: nn.Module, adapter_name: str) -> list[AdaptedSite]:
    """Every module of a PEFT model that an adapter touches, in the model's order; empty for prompt methods."""
    root = base_of(model)
    every_lora = str(getattr(_config(model, adapter_name), "peft_type", "")).endswith("XLORA")
    known = Counter(map(id, (module for _, module in root.named_modules(remove_duplicate=False))))
    return [
        _site(name, module, known[id(module)], _matrices(module, adapter_name, _config(model, adapter_name)))
        for name, module in root.named_modules()
        if name and (_touches(module, adapter_name) or (every_lora and _is_wrapper(module)))
    ]


def base_of(model: nn.Module) -> nn.Module:
    """The base model inside a PeftModel or PeftMixedModel, with the adapters still in place."""
    whole: Any = model
    if callable(getattr(type(model), "get_base_model", None)):
        base: nn.Module = whole.get_base_model()
        return base
    inner: nn.Module = whole.base_model.model if hasattr(model, "peft_config") else model
    return inner


def host_of(module: nn.Module) -> nn.Module:
    """The base's own module beneath its adapters."""
    inner: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else getattr(module, "model", module)
    host: nn.Module = inner
    return host


def blocks_of(model: nn.Module) -> list[str]:
    """Names of a transformer's blocks: the children of the longest lists of modules."""
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and _is_stack(name)
    }
    return [f"{name}.{index}" for name, module in lists.items() for index in range(len(module))]


def _is_stack(name: str) -> bool:
    return re.search(r"(^|\.)(layers|layer|h|block|blocks)$", name) is not None and not re.search(
        r"(layers|layer|h|block|blocks)\.\d+\.", name
    )


def _config(model: nn.Module, adapter_name: str) -> Any:
    return getattr(model, "peft_config", {}).get(adapter_name)


def _is_wrapper(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer) and hasattr(module, "base_layer")


def _touches(module: nn.Module, adapter_name: str) -> bool:
    if hasattr(module, "adaption_gate"):
        return True
    if not _is_wrapper(module):
        return False
    return any(adapter_name in holder for holder in _holders(module))


def _holders(module: Any) -> Iterator[Any]:
    for name in module.adapter_layer_names:
        holder = getattr(module, name, None)
        if hasattr(holder, "keys"):
            yield holder


def _matrices(module: nn.Module, adapter_name: str, config: Any) -> tuple[tuple[int, int], ...]:
    """Outputs and width of the parameters that a config names, or of fused experts."""
    if not isinstance(module, InPlaceLayer):
        return ()
    host, parameters = module.get_base_layer(), module.adapted_parameters(adapter_name)
    if config.target_parameters is None and not is_fused_experts(host):
        return ()
    shapes = [as_rows(getattr(host, each).detach().to("meta"), rows_of(host, each)).shape for each in parameters]
    return tuple((shape[0], shape[1]) for shape in shapes)


def _site(name: str, module: nn.Module, names: int, matrices: tuple[tuple[int, int], ...]) -> AdaptedSite:
    host = host_of(module)
    weight = getattr(host, "weight", None)
    d_in, d_out = _widths(host, weight)
    return AdaptedSite(
        name=name,
        module=module,
        d_in=d_in,
        d_out=d_out,
        bias=getattr(host, "bias", None) is not None,
        parameters=sum(parameter.numel() for parameter in host.parameters()),
        names=names,
        matrices=matrices,
    )


def _widths(host: nn.Module, weight: Any) -> tuple[int, int]:
    if hasattr(host, "in_features"):
        return int(host.in_features), int(host.out_features)  # type: ignore[arg-type]
    if isinstance(weight, Tensor) and weight.dim() == 2:
        rows, columns = weight.shape
        return int(rows), int(columns)  # Conv1D keeps [in, out], as an embedding [rows, columns]
    return (int(weight.numel()), int(weight.numel())) if isinstance(weight, Tensor) else (0, 0)
