"""Finding an adapter's or a pool's files, on disk or on the Hub, and reading them without trusting them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from ..errors import ConfigError, FileFormatError
from ..files import read_tensors

CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True)
class HubOptions:
    """How to reach the Hub: the arguments of the same names of ``huggingface_hub``."""

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None


@dataclass(frozen=True)
class Folder:
    """A local folder, and the name under which others may know it (no path of this machine).

    Attributes:
        path: where it lies.
        name: Hub id, or the folder's own name.
    """

    path: Path
    name: str

    def read_json(self, filename: str) -> dict[str, Any]:
        """A file that holds one JSON object.

        Raises:
            FileFormatError: no such file, or not a JSON object.
        """
        path = self.path / filename
        if not path.is_file():
            raise FileFormatError(
                f"Expected a file {filename} in '{self.path}', found none. Check the folder or Hub id."
            )
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise FileFormatError(
                f"'{path}' is not JSON: {error}. It may be truncated; fetch or write it again."
            ) from error
        if not isinstance(data, dict):
            raise FileFormatError(f"Expected one JSON object in '{path}', found a {type(data).__name__}.")
        return data

    def read_weights(self, filename: str, pickles: Sequence[str]) -> dict[str, Tensor]:
        """Tensors of a safetensors file.

        Args:
            filename: of the safetensors file.
            pickles: names under which the same weights are also saved as pickles, which are never read.

        Raises:
            FileFormatError: no such file, or not a readable one.
        """
        path = self.path / filename
        if not path.is_file():
            pickle = next((name for name in pickles if (self.path / name).is_file()), None)
            found = f"found {pickle}, a pickle, which is never read because it can run code" if pickle else "found none"
            raise FileFormatError(f"Expected {filename} in '{self.path}', {found}. Save the adapter as safetensors.")
        return read_tensors(path)[0]


def find_folder(
    where: str | os.PathLike[str], filenames: Sequence[str], hub: HubOptions, subfolder: str | None = None
) -> Folder:
    """A local folder, or a download of the named files of a Hub repository.

    Raises:
        ConfigError: neither a folder nor a repository that can be reached.
    """
    inside = subfolder or ""
    if Path(where).is_dir():
        path = Path(where) / inside
        return Folder(path, path.resolve().name)
    try:
        root = snapshot_download(
            os.fspath(where),
            revision=hub.revision,
            token=hub.token,
            cache_dir=None if hub.cache_dir is None else Path(hub.cache_dir),
            allow_patterns=[f"{inside}/{name}" if inside else name for name in filenames],
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ConfigError(
            f"'{os.fspath(where)}' is neither a folder here nor a Hub repository that can be reached: {error}"
        ) from error
    return Folder(Path(root) / inside, os.fspath(where) + (f"/{inside}" if inside else ""))


def refuse_fields(source: str, config: Mapping[str, Any], refused: Mapping[str, tuple[Sequence[Any], str]]) -> None:
    """Refuse config fields whose value is none of those that can be represented.

    Args:
        source: the adapter, for errors.
        config: its fields.
        refused: by field name, the values that are fine (a missing field is too) and why others are not.

    Raises:
        ConfigError: names every such field, its value and the reason.
    """
    reasons = [
        f"{name}={config[name]!r}: {reason}"
        for name, (fine, reason) in refused.items()
        if name in config and config[name] is not None and config[name] not in fine
    ]
    if reasons:
        raise ConfigError(f"Adapter '{source}' cannot become part of a pool. " + "; ".join(reasons) + ".")
