"""What commands about banks are given: a bank, adapters in folders, names in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..profiles import ProfileBank


def open_bank(where: str) -> ProfileBank:
    """A bank in a folder or on the Hub.

    Raises:
        ConfigError, FileFormatError: there is none, or it is damaged.
    """
    from ..profiles import ProfileBank

    return ProfileBank.from_pretrained(where)


def find_adapters(sources: list[str]) -> dict[str, str]:
    """Adapter folders by the names for their profiles.

    Raises:
        ConfigError: a folder without adapters, or a name twice.
    """
    from ..errors import ConfigError

    found: dict[str, str] = {}
    for source in sources:
        name, equals, folder = source.partition("=")
        if equals and not Path(source).exists():
            some = {name: Path(folder)}
        elif is_adapter(Path(source)):
            some = {Path(source).resolve().name: Path(source)}
        else:
            some = {each.parent.name: each.parent for each in sorted(Path(source).glob("*/adapter_config.json"))}
        if not some:
            raise ConfigError(
                f"Expected NAME=FOLDER, an adapter's folder or a folder of such folders, found '{source}'."
            )
        if twice := sorted(set(some) & set(found)):
            raise ConfigError(f"Two adapters are called {twice[0]!r}. Name one of them otherwise, as NAME=FOLDER.")
        found |= {name: str(folder) for name, folder in some.items()}
    return found


def folder_of(name: str) -> str:
    """The name of a profile as that of a folder: percent-encoded, and shortened with a digest if it is long."""
    import hashlib
    from urllib.parse import quote

    quoted = quote(name, safe=" @+,=") if name.strip(".") else name.replace(".", "%2E")
    if len(quoted) <= 200:
        return quoted
    return f"{quoted[:160]}~{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def read_names(path: Path) -> list[str]:
    """Names in a file: one a line, or a JSON list if it ends with ``.json``.

    Raises:
        FileFormatError: not UTF-8, or not a list of strings.
    """
    from ..errors import FileFormatError

    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else [line for line in text.split("\n") if line]
    except ValueError as error:
        raise FileFormatError(f"Expected names in '{path}', in UTF-8, found other content: {error}.") from error
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise FileFormatError(f"Expected a JSON list of names in '{path}', found something else.")
    return found


def chosen_names(wanted: list[str] | None, names: Path | None) -> list[str]:
    """Names from the command line and from a file.

    Raises:
        ConfigError: there is none.
        FileFormatError: the file cannot be read.
    """
    from ..errors import ConfigError

    chosen = [*(wanted or ()), *(() if names is None else read_names(names))]
    if not chosen:
        raise ConfigError("Expected names of profiles after the bank or in --names, found none.")
    return chosen


def is_adapter(path: Path) -> bool:
    """Whether a folder has an adapter or a bank."""
    return (path / "adapter_config.json").is_file()
