"""``peft-xmask inspect``: what an adapter folder, a pool folder or a tensor file is. No model is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .console import bytes_text, output, print_facts, print_json

if TYPE_CHECKING:
    from torch import Tensor

_SHOWN_FIELDS = (
    "task_type", "num_profiles", "num_adapters", "bottleneck_size", "mask_type", "top_k", "pool", "pool_seed",
    "target", "r", "lora_alpha", "density", "selection", "scope", "include_bias", "storage_dtype",
    "mask_fingerprint", "mask_dtype", "target_modules", "target_parameters", "modules_to_save",
)  # fmt: skip


def inspect(
    path: Annotated[Path, typer.Argument(help="Adapter folder, pool folder or .safetensors file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Describe a folder or file: sizes, fingerprints, masks. No model is needed."""
    facts = describe(path)
    if as_json:
        print_json(facts)
        return
    sizes = {name.replace("_bytes", ""): bytes_text(size) for name, size in facts.get("sizes", {}).items()}
    shown = {name: value for name, value in facts.items() if name not in ("sizes", "masks", "tensors", "config")}
    print_facts({**shown, **facts.get("config", {}), **sizes})
    if "masks" in facts:
        output.print()
        _print_masks(facts["masks"])
    elif "tensors" in facts:
        _print_tensors(facts["tensors"])


def describe(path: Path) -> dict[str, Any]:
    """Everything ``inspect`` can say of a path, as plain data.

    Raises:
        FileFormatError: nothing that is known lies there, or it is damaged.
    """
    from ..errors import FileFormatError
    from ..pool.storage import JSON_FILE

    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            return describe_adapter(path)
        if (path / JSON_FILE).is_file():
            return describe_pool(path)
        raise FileFormatError(f"Expected adapter_config.json or {JSON_FILE} in '{path}', found neither.")
    return describe_file(path)


def describe_adapter(folder: Path) -> dict[str, Any]:
    """An adapter folder: ours, or of any other PEFT method.

    Raises:
        FileFormatError: its config or tensors are damaged, or its masks are not what the config says.
    """
    from ..core.adapter_folder import ADAPTER_FILE
    from ..tuners.base.profile_size import profile_size

    config = _read_json(folder / "adapter_config.json")
    facts = _file_facts(folder / ADAPTER_FILE, config)
    size = profile_size(folder)
    facts |= {
        "kind": "adapter folder",
        "path": str(folder),
        "method": config.get("peft_type"),
        "base_model": config.get("base_model_name_or_path"),
        "base_fingerprint": config.get("base_fingerprint"),
        "pool_fingerprint": config.get("pool_fingerprint"),
        "labels": _labels(folder),
        "sizes": {
            "payload_bytes": size.payload_bytes,
            "head_bytes": size.head_bytes,
            "file_bytes": size.file_bytes,
            "folder_bytes": size.folder_bytes,
            "pool_bytes": size.pool_bytes,
        },
        "config": {name: config[name] for name in _SHOWN_FIELDS if config.get(name) is not None},
    }
    return facts


def describe_pool(folder: Path) -> dict[str, Any]:
    """A pool folder.

    Raises:
        FileFormatError: it is not a pool, or is damaged.
    """
    from ..pool import AdapterPool

    pool = AdapterPool.from_pretrained(str(folder))
    found: dict[str, Any] = {} if pool.common is None else {"common": pool.common.source}
    found |= {} if pool.fitting is None else {"fitting": dict(pool.fitting.facts)}
    return {
        "kind": f"{pool.kind} pool",
        "path": str(folder),
        "num_adapters": pool.num_adapters,
        "bottleneck_size": pool.bottleneck_size,
        "insertion_form": pool.insertion_form,
        "activation": pool.activation,
        "dtype": str(pool.dtype).removeprefix("torch."),
        "fingerprint": pool.fingerprint,
        "nbytes": pool.nbytes,
        **found,
    }


def describe_file(path: Path) -> dict[str, Any]:
    """A bare safetensors file; a config beside it is not consulted.

    Raises:
        FileFormatError: it is missing or damaged.
    """
    facts = _file_facts(path, {})
    payload = sum(tensor["bytes"] for tensor in facts["tensors"])
    return {
        "kind": "tensor file",
        "path": str(path),
        **facts,
        "sizes": {"payload_bytes": payload, "file_bytes": path.stat().st_size},
    }


def _file_facts(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    from ..core.files import read_tensors

    tensors, _ = read_tensors(path)
    facts: dict[str, Any] = {
        "tensors": [
            {
                "name": name,
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "bytes": tensor.nbytes,
            }
            for name, tensor in sorted(tensors.items())
        ]
    }
    bits = _part(tensors, "xpeft_bits")
    if bits is not None:
        facts["masks"] = _describe_masks(bits, _part(tensors, "xpeft_gain_bits"), config)
    return facts


def _describe_masks(bits: Tensor, gain_bits: Tensor | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """Masks ``[P, 2, S, bytes]`` and gains ``[P, S, 2]``, checked against the config where there is one."""
    from ..core.packing import unpack_bits, unpack_halves
    from ..errors import MaskFormatError

    if bits.dim() != 4 or bits.shape[1] != 2:
        raise MaskFormatError(f"Expected masks of shape [P, 2, S, bytes], found {tuple(bits.shape)}.")
    rows, _, sites, width = bits.shape
    facts: dict[str, Any] = {"rows": rows, "sites": sites, "gain": None}
    if gain_bits is not None:
        facts["gain"] = [round(gain, 4) for gain in unpack_halves(gain_bits)[..., 0].mean(0).tolist()]
    mask_type, count = config.get("mask_type"), config.get("num_adapters")
    if config:
        _check_masks(bits, gain_bits, config)
    else:
        ones = unpack_bits(bits, 8 * width).sum(-1).unique()
        mask_type, count = ("hard", 8 * width) if len(ones) == 1 else ("soft", width // 2)
        facts["note"] = "read without a config: the kind of mask and the number of adapters are inferred"
    facts |= {"mask_type": mask_type, "num_adapters": count}
    return facts | (_hard_facts if mask_type == "hard" else _soft_facts)(bits, int(count or 0))


def _hard_facts(bits: Tensor, num_adapters: int) -> dict[str, Any]:
    from ..core.packing import unpack_bits

    chosen = unpack_bits(bits, num_adapters)
    per_mask = int(chosen.sum(-1).flatten()[0])
    return {
        "top_k": per_mask,
        "density": per_mask / num_adapters,
        "used_down": chosen[:, 0].any(0).sum(-1).tolist(),
        "used_up": chosen[:, 1].any(0).sum(-1).tolist(),
        "used_by_both": (chosen[:, 0] & chosen[:, 1]).sum(-1).float().mean(0).round().int().tolist(),
    }


def _soft_facts(bits: Tensor, num_adapters: int) -> dict[str, Any]:
    from ..core.packing import unpack_halves

    weights = unpack_halves(bits).softmax(-1)
    entropy = -(weights * weights.clamp_min(1e-30).log()).sum(-1).mean(0)
    return {
        "entropy": [[round(value / math.log(num_adapters), 4) for value in side] for side in entropy.tolist()],
        "effective_down": [round(value, 1) for value in entropy[0].exp().tolist()],
        "effective_up": [round(value, 1) for value in entropy[1].exp().tolist()],
    }


def _check_masks(bits: Tensor, gain_bits: Tensor | None, config: Mapping[str, Any]) -> None:
    from ..errors import FileFormatError
    from ..tuners.xpeft.spec import MaskSpec

    try:
        spec = MaskSpec(
            num_profiles=int(config["num_profiles"]),
            num_sites=bits.shape[2],
            num_adapters=int(config["num_adapters"]),
            mask_type=str(config["mask_type"]),
            top_k=int(config["top_k"]),
            weighting="mean",
            estimator="straight_through",
            scale=1.0,
            learn_gain=gain_bits is not None,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"adapter_config.json is not that of an X-PEFT adapter: {error!r}.") from error
    spec.check(bits, gain_bits)


def _part(tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
    from ..tuners.xpeft.keys import ending

    return next((tensor for key, tensor in tensors.items() if key.endswith(ending(name))), None)


def _labels(folder: Path) -> list[str] | None:
    from ..integrations.pooled_classifier import read_classifier
    from ..tuners.base.classifier import CONFIG_FILE

    return list(read_classifier(folder).labels) if (folder / CONFIG_FILE).is_file() else None


def _read_json(path: Path) -> dict[str, Any]:
    from ..errors import FileFormatError

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(f"'{path}' is not readable JSON: {error}. Restore it.") from error
    if not isinstance(content, dict):
        raise FileFormatError(f"Expected an object in '{path}', found {type(content).__name__}. Restore it.")
    return content


def _print_masks(masks: Mapping[str, Any]) -> None:
    count = masks["num_adapters"]
    kind = f"{masks['mask_type']} masks of {count} adapters, {masks['rows']} row(s), {masks['sites']} sites"
    if masks["mask_type"] == "hard":
        kind += f", {masks['top_k']} of them in each mask (density {masks['density']:.3f})"
        columns = {"used, down": "used_down", "used, up": "used_up", "in both masks": "used_by_both"}
    else:
        columns = {"effective, down": "effective_down", "effective, up": "effective_up"}
    output.print(kind + (f"; {masks['note']}" if "note" in masks else ""), markup=False, soft_wrap=True)
    if masks["gain"] is not None:
        columns["gain"] = "gain"
    table = Table("site", *columns)
    for site in range(masks["sites"]):
        table.add_row(str(site), *(str(masks[name][site]) for name in columns.values()))
    output.print(table)


def _print_tensors(tensors: list[dict[str, Any]], limit: int = 20) -> None:
    table = Table("tensor", "shape", "dtype", "bytes")
    for tensor in tensors[:limit]:
        table.add_row(tensor["name"], str(tensor["shape"]), tensor["dtype"], f"{tensor['bytes']:,}")
    output.print(table)
    if len(tensors) > limit:
        output.print(f"and {len(tensors) - limit} more tensors (all of them with --json)")
