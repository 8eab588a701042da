"""A bank as one file, its hard masks at the information bound."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.files import read_tensors, write_tensors
from ..errors import ConfigError, FileFormatError
from ..tuners.xpeft import XPEFTConfig
from .combinatorial import decode, encode
from .config import config_of
from .names import TENSORS, NameIndex
from .rows import BankRows

FORMAT, VERSION = "peft_xmask.bank_archive", "1"
_CODED, _GAIN_BITS, _SHARED = "coded", "gain_bits", "shared."


def write_archive(bank: BankRows, path: Path) -> None:
    """Write every profile of a bank; each is checked.

    The file is a safetensors file: ``coded`` (see :mod:`~peft_xmask.bank.combinatorial`), ``gain_bits`` if there
    are gains, the tensors of :class:`~peft_xmask.bank.names.NameIndex`, and ``shared.<name>``. Its metadata:
    ``bank_format``, ``archive_version``, ``sites`` and ``config``, the adapter's config in JSON.

    Raises:
        ConfigError: soft masks.
    """
    if bank.spec.mask_type != "hard":
        raise ConfigError("Expected a bank of hard masks, found soft ones: these have no code that is shorter.")
    names = list(bank)
    bits, gain_bits = bank.pick(names)
    tensors = {_CODED: encode(bits, bank.spec.num_adapters, bank.spec.top_k), **NameIndex.build(names).tensors}
    if gain_bits is not None:
        tensors[_GAIN_BITS] = gain_bits
    tensors.update({f"{_SHARED}{name}": tensor for name, tensor in bank.shared.items()})
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in bank.config.to_dict().items()}
    facts = {"sites": str(bank.spec.num_sites), "config": json.dumps(config, sort_keys=True, default=str)}
    write_tensors(path, tensors, {"bank_format": FORMAT, "archive_version": VERSION, **facts})


def read_archive(path: Path) -> tuple[XPEFTConfig, Tensor, Tensor | None, NameIndex, Mapping[str, Tensor]]:
    """What makes a bank: config, bits, gain_bits, names, shared.

    Raises:
        FileFormatError, MaskFormatError: it is damaged, or something else.
    """
    tensors, facts = read_tensors(path)
    if (facts.get("bank_format"), facts.get("archive_version")) != (FORMAT, VERSION):
        raise FileFormatError(
            f"Expected a {FORMAT} of version {VERSION} at '{path}', found {facts.get('bank_format')!r} of version "
            f"{facts.get('archive_version')!r}."
        )
    try:
        fields: dict[str, Any] = dict(json.loads(facts["config"]))
        sites = int(facts["sites"])
        index = NameIndex({name: tensors[name] for name in TENSORS})
        coded = tensors[_CODED]
    except (KeyError, ValueError, TypeError) as error:
        raise FileFormatError(f"'{path}' is not a readable bank archive: {error!r}. It is damaged.") from error
    config = config_of(fields, str(path))
    if len(coded) != len(index):
        raise FileFormatError(f"Expected names for {len(coded)} profiles in '{path}', found {len(index)}.")
    bits = decode(coded, sites, config.num_adapters, config.top_k or 0)
    config.num_profiles = len(bits)
    shared = {name.removeprefix(_SHARED): each for name, each in tensors.items() if name.startswith(_SHARED)}
    return config, bits, tensors.get(_GAIN_BITS), index, shared
