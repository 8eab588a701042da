"""Find an adapter's or a pool's files, on disk or on the Hub, and read them without trusting them."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import Tensor

from ..errors import ConfigError, FileFormatError
from .files import read_tensors

CONFIG_FILE = "adapter_config.json"
_REPO_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class HubOptions:
    """How to reach the Hub: ``huggingface_hub``'s arguments of the same names."""

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None


@dataclass(frozen=True)
class HubPath:
    """A place on the Hub. Its name, ``owner/name[@revision][/subfolder]``, identifies it, as in ``hf://`` paths.

    Attributes:
        repo_id: ``owner/name``.
        revision: branch, tag or commit; None: the default branch.
        subfolder: inside the repository; empty: its root.
    """

    repo_id: str
    revision: str | None = None
    subfolder: str = ""

    @classmethod
    def parse(cls, name: str, revision: str | None = None, subfolder: str | None = None) -> HubPath:
        """Parse a name; the other two arguments fill in what it leaves out.

        Raises:
            ConfigError: the name has a revision that differs from ``revision``.
        """
        owner, _, rest = name.partition("/")
        repository, _, inside = rest.partition("/")
        repository, _, named = repository.partition("@")
        if not rest:
            owner, _, named = owner.partition("@")
        if named and revision not in (None, unquote(named)):
            raise ConfigError(f"'{name}' names a revision, and revision={revision!r} is another. Give one of them.")
        repo_id = f"{owner}/{repository}" if rest else owner
        return cls(repo_id, unquote(named) or revision, "/".join(part for part in (inside, subfolder) if part))

    @property
    def name(self) -> str:
        """What :meth:`parse` reads."""
        revision = f"@{quote(self.revision, safe='')}" if self.revision else ""
        return f"{self.repo_id}{revision}" + (f"/{self.subfolder}" if self.subfolder else "")


@dataclass(frozen=True)
class Folder:
    """A local folder, and a name for it that is free of local paths.

    Attributes:
        path: the folder's path.
        name: :attr:`HubPath.name`, or the folder's own name.
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
            pickles: names of pickle files with the same weights, which are never read.

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

    Args:
        where: folder, Hub id or name of a :class:`HubPath`.
        filenames: files to download, if they exist.
        hub: how to reach the Hub.
        subfolder: of the folder or repository.

    Raises:
        ConfigError: there is no such folder, and no such repository can be reached.
    """
    if Path(where).is_dir():
        path = Path(where) / (subfolder or "")
        return Folder(path, path.resolve().name)
    place = HubPath.parse(os.fspath(where), hub.revision, subfolder)
    inside = place.subfolder
    try:
        root = snapshot_download(
            place.repo_id,
            revision=place.revision,
            token=hub.token,
            cache_dir=None if hub.cache_dir is None else Path(hub.cache_dir),
            allow_patterns=[f"{inside}/{name}" if inside else name for name in filenames],
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ConfigError(
            f"'{os.fspath(where)}' is neither a folder here nor a Hub repository that can be reached: "
            f"{hub_reason(error, place)}"
        ) from error
    return Folder(Path(root) / inside, place.name)


def upload(
    write: Callable[[Path], None],
    repo_id: str,
    *,
    what: str,
    filenames: Sequence[str],
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
) -> tuple[str, str]:
    """Create a Hub repository if needed and upload a folder in one commit; return its address and name.

    Args:
        write: fills the folder.
        what: what is uploaded, for error messages.
        filenames: names or patterns of files that go from the repository where the folder has none of them.

    Raises:
        ConfigError: there is no token, or it may not write to the repository.
    """
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            written = {path.name for path in Path(folder).iterdir()}
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                ignore_patterns=[".*"],  # locks
                delete_patterns=[name for name in filenames if name not in written] or None,
            )
    except HfHubHTTPError as error:
        reason = hub_reason(error, HubPath(repo_id, revision))
        raise ConfigError(f"The {what} could not be pushed to '{repo_id}': {reason}") from error
    return str(commit.commit_url), HubPath(repo_id, revision).name


def hub_reason(error: Exception, place: HubPath) -> str:
    """Why a request for ``place`` failed, and what to do, in a sentence or two."""
    if isinstance(error, RevisionNotFoundError):
        return f"'{place.repo_id}' has no revision '{place.revision}'. Check its branches, tags and commits."
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        return (
            f"the Hub has no repository '{place.repo_id}', or it is private, or the token may not do this. Check the "
            "id, then run `hf auth login`, set HF_TOKEN, or pass token=..."
        )
    if isinstance(error, LocalEntryNotFoundError):
        return (
            f"'{place.repo_id}' is not, or not wholly, in the local cache, and the Hub cannot be reached or "
            f"HF_HUB_OFFLINE is set. Load it once while online. ({error})"
        )
    return str(error)


def refuse_fields(source: str, config: Mapping[str, Any], refused: Mapping[str, tuple[Sequence[Any], str]]) -> None:
    """Reject config fields with values that have no representation.

    Args:
        source: the adapter's name, for error messages.
        config: its fields.
        refused: by field name, the accepted values (a missing field is accepted too) and why others are not.

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


def hub_id(name: str | None) -> str | None:
    """``name`` if it is a valid name on the Hub and not a local folder."""
    fits = name and not Path(name).exists() and _REPO_ID.fullmatch(HubPath.parse(name).repo_id)
    return name if fits else None


def shown_name(name: str | None) -> str:
    """A name without local paths, for others to see."""
    if not name:
        return "not named"
    return f"`{name}`" if hub_id(name) else f"`{Path(name).name}`, a folder where this was made"
