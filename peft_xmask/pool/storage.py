"""Pools on disk and on the Hub: ``pool.json``, and ``pool.safetensors`` unless the pool is a seed alone.

``pool.json`` is one object. Of every pool: ``format`` ("peft_xmask.pool"), ``format_version`` (1), ``kind``,
``num_adapters``, ``bottleneck_size``, ``dtype``, ``fingerprint``. Of a random pool: ``seed``. Of a trained pool:
``insertion_form``, ``activation``, ``layer_norm``, ``sites`` (name, in_features, out_features, biases; sorted by name),
``sources``, ``norms`` (of each tensor when the pool was made, in the order of the sites), and of the tensor file
``file_bytes`` and ``file_sha256``. No other fields. Format version 2 adds ``common``: an object with ``inside``,
``source`` and, of the always-on adapter, ``kind``, ``bottleneck_size``, ``insertion_form``, ``activation``,
``layer_norm``, ``sites`` and ``norms``. Its tensors are in the same file, with ``common/`` before their names. Format
version 3, of fitted pools, adds ``fitting``, an object that says on what the pool was grown, and a float32 tensor
``prior/coefficients [N, K]`` (:class:`~peft_xmask.pool.directions.Fitting`), with K in ``fitting["principal"]``. In
version 4 the directions' tensors have K in place of N: the pool's adapters are mixtures of these, by the coefficients.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import ACTIVATIONS
from ..core.files import dtype_from_name, dtype_name, read_tensors, sha256_of_file, write_tensors, write_text
from ..core.hub import Folder, upload
from ..errors import ConfigError, FileFormatError, PoolMismatchError
from .card import model_card
from .common import CommonPart
from .directions import Fitting
from .random import RandomAdapters
from .slice import hold
from .trained import PARTS, SiteTensors, TrainedAdapters

JSON_FILE = "pool.json"
TENSOR_FILE = "pool.safetensors"
COMMON = "common/"
"""Begins the names of a common part's tensors. No module is called so: names of modules have no slash."""
COEFFICIENTS = "prior/coefficients"
CARD_FILE = "README.md"
FILENAMES = (JSON_FILE, TENSOR_FILE)

FORMAT = "peft_xmask.pool"
FORMAT_VERSIONS = (1, 2, 3, 4)
"""2: with a common part; 3: with one, and fitted; 4: fitted, as coefficients on principal directions."""
_FITTED = (3, 4)
_MIXTURES = 4

_Check = tuple[Callable[[Any], bool], str]
_COUNT: _Check = (lambda x: type(x) is int and x >= 1, "a whole number of at least 1")
_TEXT: _Check = (lambda x: isinstance(x, str) and x != "", "a string")
_FLAG: _Check = (lambda x: type(x) is bool, "true or false")


def _one_of(*values: object) -> _Check:
    return (lambda x: isinstance(x, (str, int)) and not isinstance(x, bool) and x in values, f"one of {values}")


def _list_of(check: Callable[[Any], bool], what: str) -> _Check:
    return (lambda x: isinstance(x, list) and len(x) > 0 and all(check(item) for item in x), f"a list of {what}")


_SITE: Mapping[str, _Check] = {"name": _TEXT, "in_features": _COUNT, "out_features": _COUNT, "biases": _FLAG}
_COMMON: Mapping[str, _Check] = {
    "format": _one_of(FORMAT),
    "format_version": _one_of(*FORMAT_VERSIONS),
    "kind": _one_of("random", "lora", "bottleneck"),
    "num_adapters": _COUNT,
    "bottleneck_size": _COUNT,
    "dtype": _one_of("float32", "bfloat16", "float16"),
    "fingerprint": _TEXT,
}
_RANDOM: Mapping[str, _Check] = {**_COMMON, "seed": (lambda x: type(x) is int and 0 <= x < 2**64, "0 <= seed < 2**64")}
_TRAINED: Mapping[str, _Check] = {
    **_COMMON,
    "insertion_form": _one_of("sequential", "parallel"),
    "activation": _one_of(*sorted(ACTIVATIONS)),
    "layer_norm": _FLAG,
    "sites": _list_of(lambda x: isinstance(x, dict), "objects"),
    "sources": _list_of(lambda x: isinstance(x, str), "strings"),
    "norms": _list_of(lambda x: type(x) in (int, float) and 0 <= x < float("inf"), "numbers of at least 0"),
    "file_bytes": _COUNT,
    "file_sha256": (lambda x: isinstance(x, str) and len(x) == 64, "64 hexadecimal digits"),
}
_FILE = ("file_bytes", "file_sha256")
_OBJECT: _Check = (lambda x: isinstance(x, dict), "an object")
_FITTING: _Check = (lambda x: isinstance(x, dict) and _COUNT[0](x.get("principal")), "an object with principal >= 1")
_PART: Mapping[str, _Check] = {
    "inside": _FLAG,
    **{
        name: _TRAINED[name]
        for name in ("kind", "bottleneck_size", "insertion_form", "activation", "layer_norm", "sites", "norms")
    },
    "source": (lambda x: isinstance(x, str), "a string"),
}
"""The object ``common``."""


def _checks_of(facts: Mapping[str, Any]) -> Mapping[str, _Check]:
    checks = _RANDOM if facts.get("kind") == "random" else _TRAINED
    version = facts.get("format_version")
    if version not in (2, *_FITTED):
        return checks
    added = {name: _TRAINED[name] for name in _FILE} | {"common": _OBJECT}
    return {**checks, **added, **({"fitting": _FITTING} if version in _FITTED else {})}


def write_pool(
    folder: Path,
    adapters: RandomAdapters | TrainedAdapters,
    common: CommonPart | None = None,
    fitting: Fitting | None = None,
) -> None:
    """Write a pool. Each file is replaced as a whole, ``pool.json`` last; readers reject a mixture of two pools.

    Raises:
        ConfigError: ``folder`` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"Expected a directory to save the pool in, found a file: '{folder}'.")
    facts: dict[str, object] = {
        "format": FORMAT,
        "format_version": _version(adapters, common, fitting),
        "kind": adapters.kind,
        "num_adapters": adapters.num_adapters,
        "bottleneck_size": adapters.bottleneck_size,
        "dtype": dtype_name(adapters.dtype),
        "fingerprint": adapters.fingerprint if common is None else common.fingerprint_around(adapters.fingerprint),
    }
    tensor_file = folder / TENSOR_FILE
    tensors: dict[str, Tensor] = {}
    if isinstance(adapters, RandomAdapters):
        facts["seed"] = adapters.seed
    else:
        tensors.update(adapters.tensors())
        facts.update(_trained_facts(adapters), sources=list(adapters.sources))
    if common is not None:
        tensors.update({f"{COMMON}{name}": tensor for name, tensor in common.adapter.tensors()})
        part = {"inside": common.inside, "kind": common.adapter.kind, "source": common.source}
        part["bottleneck_size"] = common.adapter.bottleneck_size
        facts["common"] = {**part, **_trained_facts(common.adapter)}
    if fitting is not None:
        tensors[COEFFICIENTS] = fitting.coefficients
        facts["fitting"] = dict(fitting.facts)
    if tensors:
        write_tensors(tensor_file, tensors)
        facts.update(file_bytes=tensor_file.stat().st_size, file_sha256=sha256_of_file(tensor_file))
    write_text(folder / CARD_FILE, model_card(adapters, common, fitting))
    write_text(folder / JSON_FILE, json.dumps(facts, indent=1) + "\n")
    if not tensors:
        tensor_file.unlink(missing_ok=True)


def _version(adapters: RandomAdapters | TrainedAdapters, common: CommonPart | None, fitting: Fitting | None) -> int:
    if common is None or fitting is None:
        return 1 if common is None else 2
    return 3 if isinstance(adapters, RandomAdapters) or adapters.coefficients is None else _MIXTURES


def _trained_facts(adapters: TrainedAdapters) -> dict[str, object]:
    return {
        "insertion_form": adapters.insertion_form,
        "activation": adapters.activation,
        "layer_norm": adapters.layer_norm,
        "sites": [
            {
                "name": name,
                "in_features": site.in_features,
                "out_features": site.out_features,
                "biases": site.down_bias is not None,
            }
            for name, site in adapters.sites.items()
        ],
        "norms": list(adapters.norms),
    }


def read_pool(
    folder: Folder, dtype: torch.dtype | None
) -> tuple[RandomAdapters | TrainedAdapters, CommonPart | None, Fitting | None]:
    """Read a pool, its common part and how it was fitted, and check all of it.

    Args:
        folder: the pool's folder.
        dtype: dtype to hold the tensors in; None: as stored.

    Raises:
        FileFormatError: a field, the file's size or digest, or a tensor's name, shape or dtype is not as documented.
        PoolMismatchError: the content has another fingerprint than the one recorded.
    """
    facts = folder.read_json(JSON_FILE)
    where = folder.path / JSON_FILE
    _check_fields(where, facts, _checks_of(facts))
    if "common" in facts:
        _check_fields(where, facts["common"], _PART)
        _check_inside(where, facts)
    stored = dtype_from_name(facts["dtype"])
    wanted = dtype or stored
    tensors = {} if "file_bytes" not in facts else _read_checked(folder.path / TENSOR_FILE, where, facts, stored)
    coefficients = tensors.pop(COEFFICIENTS, None)
    if coefficients is not None and not coefficients.isfinite().all():
        raise FileFormatError(f"Expected finite numbers in '{COEFFICIENTS}' of '{folder.path / TENSOR_FILE}'.")
    mixtures = coefficients if facts["format_version"] == _MIXTURES else None
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(COMMON)}
    common = None
    if "common" in facts:
        of_common = _as_pool(facts)
        there = {name.removeprefix(COMMON): tensor for name, tensor in tensors.items() if name not in own}
        recorded = _assembled(where, of_common, there, facts["fingerprint"])
        fingerprint_of = CommonPart(recorded, facts["common"]["inside"]).fingerprint_around
        common = CommonPart(_held(of_common, there, wanted), facts["common"]["inside"])
    made: RandomAdapters | TrainedAdapters
    if facts["kind"] == "random":
        made = RandomAdapters(facts["num_adapters"], facts["bottleneck_size"], facts["seed"], wanted)
        found = made.fingerprint
    else:
        found = replace(_assembled(where, facts, own, facts["fingerprint"]), coefficients=mixtures).fingerprint
        made = replace(_held(facts, own, wanted), coefficients=mixtures)
    _check_fingerprint(where, facts["fingerprint"], found if common is None else fingerprint_of(found))
    return made, common, None if coefficients is None else Fitting(facts["fitting"], coefficients)


def _check_inside(where: Path, facts: Mapping[str, Any]) -> None:
    """A common part inside the pair must have the form and the shapes of the directions."""
    same = ("insertion_form", "activation", "layer_norm", "bottleneck_size", "sites")
    wrong = [name for name in same if facts.get(name) != facts["common"][name]] if facts["common"]["inside"] else []
    if wrong:
        raise FileFormatError(
            f"Expected the common part in '{where}' to have the {', '.join(wrong)} of the pool, since it is inside the "
            "mixed matrices; found others. Fetch or write the pool again."
        )


def _as_pool(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a common part, as those of a pool of one adapter in the same file."""
    common = facts["common"]
    return {
        **common,
        "num_adapters": 1,
        "sources": [common["source"]],
        "file_sha256": f"common of {facts['file_sha256']}",
    }


def _assembled(
    where: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], fingerprint: str
) -> TrainedAdapters:
    """Adapters as they are stored, whose norms are those that were recorded."""
    if len(facts["norms"]) != len(tensors):
        raise FileFormatError(f"Expected {len(tensors)} norms in '{where}', found {len(facts['norms'])}.")
    adapters = _assemble(facts, tensors, facts["file_sha256"])
    if name := adapters.norm_differs_at():
        raise PoolMismatchError(
            f"The norm of '{name}' is not the one that '{where}' records: the tensors are those of another pool, or "
            "were rescaled. Fetch or write the pool again.",
            expected=fingerprint,
            found=name,
        )
    return adapters


def _check_fields(where: Path, facts: Mapping[str, Any], checks: Mapping[str, _Check]) -> None:
    for name, (fits, expected) in checks.items():
        if name not in facts or not fits(facts[name]):
            found = repr(facts[name])[:80] if name in facts else "nothing"
            raise FileFormatError(f"Expected {name} to be {expected} in '{where}', found {found}.")
    unknown = sorted(set(facts) - set(checks))
    if unknown:
        raise FileFormatError(f"Unknown fields {unknown} in '{where}'. Expected only {sorted(checks)}.")
    for site in facts.get("sites", ()):
        _check_fields(where, site, _SITE)
    if "sources" in facts and len(facts["sources"]) != facts["num_adapters"]:
        raise FileFormatError(
            f"Expected {facts['num_adapters']} sources in '{where}', one per adapter, found {len(facts['sources'])}."
        )


def _check_fingerprint(where: Path, recorded: str, found: str) -> None:
    if recorded != found:
        raise PoolMismatchError(
            f"'{where}' records the fingerprint {recorded}, but the pool in this folder has {found}. The files are of "
            "two different pools; fetch or write the pool again.",
            expected=recorded,
            found=found,
        )


def _read_checked(path: Path, where: Path, facts: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The memory-mapped tensors of a file whose size, digest, names, shapes and dtypes are those of ``facts``."""
    size = path.stat().st_size if path.is_file() else None
    if size != facts["file_bytes"]:
        found = "found none" if size is None else f"found {size} bytes: truncated, oversized or of another pool"
        raise FileFormatError(f"Expected {facts['file_bytes']} bytes in '{path}', as '{where}' says; {found}.")
    digest = sha256_of_file(path)
    if digest != facts["file_sha256"]:
        raise FileFormatError(
            f"Expected '{path}' to have the SHA-256 digest {facts['file_sha256']}, as '{where}' says, found {digest}. "
            "The file is damaged or of another pool; fetch or write it again."
        )
    tensors, _ = read_tensors(path)
    found_forms = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    expected = _expected_forms(facts, dtype)
    for name in sorted(set(expected) | set(found_forms)):
        if expected.get(name) != found_forms.get(name):
            raise FileFormatError(
                f"Expected tensor '{name}' of '{path}' to be {expected.get(name, 'absent')}, found "
                f"{found_forms.get(name, 'nothing')}."
            )
    return tensors


def _expected_forms(facts: Mapping[str, Any], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    forms = {} if facts["kind"] == "random" else _forms_of(facts, dtype)
    if "common" in facts:
        of_common = _forms_of({**facts["common"], "num_adapters": 1}, dtype)  # it has no version: never mixtures
        forms.update({f"{COMMON}{name}": form for name, form in of_common.items()})
    if "fitting" in facts:
        forms[COEFFICIENTS] = ((facts["num_adapters"], facts["fitting"]["principal"]), torch.float32)
    return forms


def _forms_of(facts: Mapping[str, Any], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    n = facts["fitting"]["principal"] if facts.get("format_version") == _MIXTURES else facts["num_adapters"]
    b = facts["bottleneck_size"]
    forms: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for site in facts["sites"]:
        name, d_in, d_out = site["name"], site["in_features"], site["out_features"]
        forms[f"{name}.down"] = ((n, b, d_in), dtype)
        forms[f"{name}.up"] = ((n, d_out, b), dtype)
        if site["biases"]:
            forms[f"{name}.down_bias"] = ((n, b), dtype)
            forms[f"{name}.up_bias"] = ((n, d_out), dtype)
    return forms


def _held(facts: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> TrainedAdapters:
    """The pool in ``dtype``. Reuses the tensors of an earlier load of the same file, if there are any."""
    digest = facts["file_sha256"]
    keys = [(digest, dtype, name) for name in tensors]
    held = hold(keys, lambda missing: [tensors[key[2]].to(dtype) for key in missing])
    return _assemble(facts, dict(zip(tensors, held, strict=True)), (digest, dtype))


def _assemble(facts: Mapping[str, Any], tensors: Mapping[str, Tensor], identity: Hashable) -> TrainedAdapters:
    names = sorted(site["name"] for site in facts["sites"])
    sites = {
        name: SiteTensors(**{part: tensors[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in tensors})
        for name in names
    }
    return TrainedAdapters(
        kind=facts["kind"],
        insertion_form=facts["insertion_form"],
        activation=facts["activation"],
        layer_norm=facts["layer_norm"],
        sites=sites,
        sources=tuple(facts["sources"]),
        norms=tuple(float(norm) for norm in facts["norms"]),
        identity=identity,
        mask_weighting="signed" if facts.get("common", {}).get("inside") else "mean",
    )


def stored_bytes(facts: Mapping[str, Any]) -> int:
    """Bytes of the tensors of a pool, from its checked ``pool.json`` alone; 0 for a pool that is a seed."""
    forms = _expected_forms(facts, dtype_from_name(facts["dtype"])).values()
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in forms)


def upload_pool(
    adapters: RandomAdapters | TrainedAdapters,
    common: CommonPart | None,
    fitting: Fitting | None,
    repo_id: str,
    *,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str | None,
) -> tuple[str, str]:
    """Create a Hub repository if needed and upload a pool; return the commit's address and the pool's name there.

    Raises:
        ConfigError: there is no token, or it may not write to the repository.
    """
    own = adapters.fingerprint
    fingerprint = own if common is None else common.fingerprint_around(own)
    return upload(
        lambda folder: write_pool(folder, adapters, common, fitting),
        repo_id,
        what="pool",
        filenames=FILENAMES,
        private=private,
        token=token,
        revision=revision,
        commit_message=commit_message or f"Upload adapter pool {fingerprint}",
    )
