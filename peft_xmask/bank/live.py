"""A bank that many processes read and change at once: an embedded database in a folder.

SQLite, because Python brings it, a commit is on disk when it returns, a killed process loses nothing that was
committed, and readers never wait for writers (write-ahead log). LMDB reads faster, but is one more dependency, needs
its size limited in advance, and a crashed reader holds pages back. Speed does not decide: reading and checking a
profile takes half a millisecond, most of it for the check. See docs/bank-format.md.
"""

from __future__ import annotations

import json
import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..core.files import write_atomically
from ..core.hub import CONFIG_FILE
from ..errors import ConfigError, FileFormatError, MaskFormatError
from ..pool.beside import carried, located
from .bank import ProfileBank
from .config import config_of, fields_of
from .database import Database, translated
from .names import NameIndex, as_name, check_name
from .profile import Profile
from .storage import BITS, LIVE_FILE, ROWS, write_bank

APPLICATION = 0x50584D42  # "PXMB"
VERSION = 1
_ROWS = 4096  # profiles that are read or written at once
_SCHEMA = """
CREATE TABLE bank (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE state (version INTEGER NOT NULL, profiles INTEGER NOT NULL);
CREATE TABLE profiles (name BLOB PRIMARY KEY, crc INTEGER NOT NULL, data BLOB NOT NULL) WITHOUT ROWID;
INSERT INTO state VALUES (1, 0);
"""


class LiveBank:
    """Profiles by name in a folder that several processes and threads may use at once.

    What :meth:`put` and :meth:`delete` did is on disk when they return, and the next :meth:`get` of any process sees
    it. Their cost does not depend on how many profiles there are. Open it with :meth:`open`; make it of a bank with
    :meth:`create`; :meth:`freeze` gives back the immutable form that is shipped and loaded by PEFT.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database = Database(path)
        facts = self._facts()
        config = config_of(_json(facts["config"], path), str(path))
        config.pool = located(config.pool, path.parent)
        shapes = _json(facts["rows"], path)
        if BITS not in shapes or not set(shapes) <= set(ROWS):
            raise FileFormatError(f"Expected rows of {', '.join(ROWS)} in '{path}', found {sorted(shapes)}.")
        try:
            self._shapes = [tuple(shapes[key]) if key in shapes else None for key in ROWS]
            bits, gain_bits, offset_bits = (
                None if shape is None else torch.empty(0, *shape, dtype=torch.uint8) for shape in self._shapes
            )
            shared = safetensors.torch.load(facts["shared"])
        except (TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            raise FileFormatError(f"'{path}' is not a readable live bank: {error}. It is damaged.") from error
        assert bits is not None
        self.kind = ProfileBank(config, bits, gain_bits, [], shared, offset_bits)
        """An empty bank of the same kind: config, spec, head."""

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> LiveBank:
        """Open a live bank.

        Raises:
            ConfigError: the folder holds no live bank.
            FileFormatError: it is damaged, or of a later version.
        """
        path = Path(folder) / LIVE_FILE
        if not path.is_file():
            frozen = " It holds a frozen one: thaw it with `peft-xmask bank thaw`." if _is_frozen(path.parent) else ""
            raise ConfigError(f"Expected a live bank ({LIVE_FILE}) in '{path.parent}', found none.{frozen}")
        return cls(path)

    @classmethod
    def create(cls, folder: str | os.PathLike[str], bank: ProfileBank) -> LiveBank:
        """Create a live bank with the profiles of a bank, all checked, and open it. The bank may be empty.

        Raises:
            ConfigError: the folder holds a bank already.
            MaskFormatError: a profile of the bank is damaged.
        """
        path = Path(folder) / LIVE_FILE
        if path.exists() or _is_frozen(path.parent):
            raise ConfigError(f"'{path.parent}' already holds a bank. Choose another folder for the live one.")
        pool = carried(fields_of(bank.config)["pool"], path.parent)
        write_atomically(path, lambda beside: _build(beside, bank, pool))
        return cls(path)

    def __len__(self) -> int:
        return self._state()[1]

    @property
    def version(self) -> int:
        """A number that grows with every change, whichever process made it."""
        return self._state()[0]

    def __contains__(self, name: object) -> bool:
        key = _encoded(name)
        return key is not None and self._database.one("SELECT 1 FROM profiles WHERE name = ?", key) is not None

    def __iter__(self) -> Iterator[str]:
        """Names in the order of their UTF-8. Changes that are made meanwhile may or may not be seen."""
        last = b""
        while some := self._database.all("SELECT name FROM profiles WHERE name > ? ORDER BY name LIMIT ?", last, _ROWS):
            yield from (self._name(name) for (name,) in some)
            last = some[-1][0]

    def get(self, name: str | int) -> Profile | None:
        """A profile by name, checked; None if there is none.

        Raises:
            MaskFormatError: its bytes changed since they were written, or are not those of a profile.
        """
        key = _encoded(name)
        found = None if key is None else self._database.one("SELECT crc, data FROM profiles WHERE name = ?", key)
        if key is None or found is None:
            return None
        profile = self._profile(key, *found)
        self.kind.check(profile)
        return profile

    def __getitem__(self, name: str | int) -> Profile:
        """As :meth:`get`.

        Raises:
            KeyError: there is no such profile.
        """
        profile = self.get(name)
        if profile is None:
            raise KeyError(f"No profile {name!r} in this live bank of {len(self)}.")
        return profile

    def select(self, names: Iterable[str | int]) -> ProfileBank:
        """A bank, in memory, of some of the profiles, in this order: what a model serves for one batch.

        Raises:
            KeyError: there is no such profile.
            ConfigError: a name occurs twice.
        """
        wanted = [as_name(name) for name in names]
        profiles = [self[name] for name in wanted]
        bits, gain_bits, offset_bits = (
            None if shape is None else _stacked([profile.parts[part] for profile in profiles], shape)
            for part, shape in enumerate(self._shapes)
        )
        assert bits is not None
        config = config_of(fields_of(self.kind.config), str(self._path))
        config.num_profiles = len(wanted)
        return ProfileBank(config, bits, gain_bits, wanted, self.kind.shared, offset_bits)

    def put(self, name: str | int, profile: Profile) -> int:
        """Add a profile, or replace the one with this name. It is on disk when this returns.

        Returns:
            The bank's new version.

        Raises:
            ConfigError: the name is invalid.
            FileFormatError, MaskFormatError: the bytes are not a valid profile of this bank.
            LockedError: other processes have been writing for a minute.
        """
        return self.put_all({as_name(name): profile})

    def put_all(self, profiles: Mapping[str, Profile]) -> int:
        """Add several profiles in one transaction: all of them or, on an error, none. Returns the new version."""
        rows = []
        for name, profile in profiles.items():
            key = check_name(as_name(name))
            self.kind.check(profile)
            data = _bytes_of(profile)
            rows.append((key, _crc(key, data), data))
        with self._database.writing() as connection:
            before = self._count(connection, [key for key, _, _ in rows])
            connection.executemany(
                "INSERT INTO profiles VALUES (?, ?, ?) "
                "ON CONFLICT (name) DO UPDATE SET crc = excluded.crc, data = excluded.data",
                rows,
            )
            return self._changed(connection, len(rows) - before)

    def delete(self, name: str | int) -> int:
        """Remove a profile and overwrite its bytes in the database with zeros. Returns the bank's new version.

        Raises:
            KeyError: there is no such profile.
            LockedError: other processes have been writing for a minute.
        """
        key = _encoded(name)
        with self._database.writing() as connection:
            if key is None or not connection.execute("DELETE FROM profiles WHERE name = ?", (key,)).rowcount:
                raise KeyError(f"No profile {name!r} in this live bank.")
            return self._changed(connection, -1)

    def rename(self, old: str | int, new: str | int) -> int:
        """Give a profile another name. Returns the bank's new version.

        Raises:
            KeyError: there is no such profile.
            ConfigError: the new name is invalid or taken.
        """
        profile, key, target = self[old], check_name(as_name(old)), check_name(as_name(new))
        data = _bytes_of(profile)
        with self._database.writing() as connection:
            if target != key and self._count(connection, [target]):
                raise ConfigError(
                    f"There is a profile called {as_name(new)!r} already. Delete it, or choose another name."
                )
            changed = connection.execute(
                "UPDATE profiles SET name = ?, crc = ? WHERE name = ? AND data = ?",
                (target, _crc(target, data), key, data),
            ).rowcount
            if not changed:
                raise KeyError(f"The profile {old!r} was changed or deleted meanwhile.")
            return self._changed(connection, 0)

    def freeze(self, folder: str | os.PathLike[str]) -> ProfileBank:
        """Write the profiles as an immutable bank, in the order of their names, and open it.

        All of it is one moment of the live bank, which may change meanwhile.

        Raises:
            ConfigError: the folder is the live bank's own.
            MaskFormatError: a profile is damaged.
            LockedError: another process is writing a bank there.
        """
        if Path(folder).resolve() == self._path.parent.resolve():
            raise ConfigError("A live bank cannot be frozen into its own folder. Choose another one.")
        with self._database.reading() as connection:
            names = (self._name(name) for (name,) in connection.execute("SELECT name FROM profiles ORDER BY name"))
            index = NameIndex.build(names)
            config = config_of(fields_of(self.kind.config), str(self._path))
            config.num_profiles, config.inference_mode = len(index), True
            rows = {
                key: ((len(index), *shape), self._stream(connection, part))
                for part, (key, shape) in enumerate(zip(ROWS, self._shapes, strict=True))
                if shape is not None
            }
            write_bank(Path(folder), config, index, rows, self.kind.shared)
        return ProfileBank.from_pretrained(folder)

    def problems(self) -> Iterator[tuple[str | None, str]]:
        """Check every page, checksum and row. Yields the name of the profile, if any, and the problem."""
        for (text,) in self._database.all("PRAGMA integrity_check"):
            if text != "ok":
                yield None, f"The database is damaged: {text}"
        found = 0
        for found, name in enumerate(self, 1):  # noqa: B007
            try:
                self.get(name)
            except (FileFormatError, MaskFormatError) as error:
                yield name, str(error)
        if found != len(self):
            yield None, f"Expected {len(self)} profiles, as the bank says, found {found}."

    def close(self) -> None:
        """Close this process's connections. The bank can be used again afterwards."""
        self._database.close()

    def _stream(self, connection: sqlite3.Connection, part: int) -> Iterator[Tensor]:
        """Rows of one tensor, in the order of names, some thousands at a time."""
        shape = self._shapes[part]
        assert shape is not None
        stored = connection.execute("SELECT name, crc, data FROM profiles ORDER BY name")
        while some := list(islice(stored, _ROWS)):
            profiles = [self._profile(*row) for row in some]
            for profile in profiles if part == 0 else ():
                self.kind.check(profile)
            yield _stacked([profile.parts[part] for profile in profiles], shape)

    def _name(self, key: object) -> str:
        try:
            if isinstance(key, bytes):
                return key.decode("utf-8")
        except UnicodeDecodeError:
            pass
        raise FileFormatError(f"Expected a name in UTF-8 in '{self._path}', found {key!r:.80}. The bank is damaged.")

    def _profile(self, key: bytes, crc: object, data: object) -> Profile:
        expected = sum(prod(shape) for shape in self._shapes if shape is not None)
        if not isinstance(data, bytes) or len(data) != expected or _crc(key, data) != crc:
            found = f"{len(data)} with {_crc(key, data)}" if isinstance(data, bytes) else repr(data)
            raise MaskFormatError(
                f"The profile {key.decode('utf-8', 'replace')!r} is damaged: expected {expected} bytes with checksum "
                f"{crc}, found {found}. Put it again."
            )
        content, at = torch.frombuffer(bytearray(data), dtype=torch.uint8), 0
        parts: list[Tensor | None] = []
        for shape in self._shapes:
            parts.append(None if shape is None else content[at : (at := at + prod(shape))].view(shape))
        assert parts[0] is not None
        return Profile(parts[0], parts[1], parts[2])

    def _count(self, connection: sqlite3.Connection, keys: Sequence[bytes]) -> int:
        query = "SELECT COUNT(*) FROM profiles WHERE name = ?"
        return sum(int(connection.execute(query, (key,)).fetchone()[0]) for key in keys)

    def _changed(self, connection: sqlite3.Connection, more: int) -> int:
        connection.execute("UPDATE state SET version = version + 1, profiles = profiles + ?", (more,))
        return int(connection.execute("SELECT version FROM state").fetchone()[0])

    def _state(self) -> tuple[int, int]:
        found = self._database.one("SELECT version, profiles FROM state")
        if found is None or not all(isinstance(number, int) for number in found):
            raise FileFormatError(f"Expected the state of a live bank in '{self._path}', found {found}. It is damaged.")
        return found[0], found[1]

    def _facts(self) -> dict[str, bytes]:
        application, version = self._database.one("PRAGMA application_id"), self._database.one("PRAGMA user_version")
        if application != (APPLICATION,) or version != (VERSION,):
            raise FileFormatError(
                f"Expected a live bank of version {VERSION} in '{self._path}', found application {application} of "
                f"version {version}. Update peft_xmask, or choose another file."
            )
        facts = dict(self._database.all("SELECT key, value FROM bank"))
        if facts.keys() != {"config", "rows", "shared"} or not all(isinstance(fact, bytes) for fact in facts.values()):
            raise FileFormatError(f"Expected config, rows and shared in '{self._path}', found {list(facts)!r:.80}.")
        return facts


def is_live_bank(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a live bank."""
    return (Path(folder) / LIVE_FILE).is_file()


def _build(path: Path, bank: ProfileBank, pool: str | None) -> None:
    names = list(bank)
    keys = [check_name(name) for name in names]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    shapes = {key: bank.row_shape(key) for key in bank.row_keys()}
    fields = {**fields_of(bank.config), "pool": pool}
    facts = {
        "config": json.dumps(fields, sort_keys=True).encode(),
        "rows": json.dumps(shapes).encode(),
        "shared": safetensors.torch.save({name: tensor.contiguous() for name, tensor in bank.shared.items()}),
    }
    with translated(path):
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = OFF")  # the file is not in its place yet
            connection.execute("PRAGMA synchronous = OFF")
            connection.executescript(_SCHEMA)
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
            connection.execute("BEGIN")
            connection.executemany("INSERT INTO bank VALUES (?, ?)", facts.items())
            for start in range(0, len(order), _ROWS):
                some = order[start : start + _ROWS]
                content = bank.pick([names[row] for row in some])
                data = torch.cat([rows.flatten(1) for rows in content.rows.values()], dim=1).numpy()
                rows = ((keys[row], each.tobytes()) for row, each in zip(some, data, strict=True))
                connection.executemany(
                    "INSERT INTO profiles VALUES (?, ?, ?)", ((key, _crc(key, each), each) for key, each in rows)
                )
            connection.execute("UPDATE state SET profiles = ?", (len(order),))
            connection.execute("COMMIT")
            connection.execute("PRAGMA journal_mode = WAL")  # kept in the file, so that no reader has to change it
        finally:
            connection.close()


def _encoded(name: object) -> bytes | None:
    """The key of a name; None for an invalid name."""
    try:
        return check_name(as_name(name))
    except ConfigError:
        return None


def _bytes_of(profile: Profile) -> bytes:
    return b"".join(part.cpu().contiguous().numpy().tobytes() for part in profile.parts if part is not None)


def _crc(key: bytes, data: bytes) -> int:
    """CRC-32 of the name and the bytes, so that no row can pass for another person's."""
    return zlib.crc32(data, zlib.crc32(key))


def _stacked(rows: Sequence[Tensor | None], shape: tuple[int, ...]) -> Tensor:
    found = [row for row in rows if row is not None]
    return torch.stack(found) if found else torch.empty(0, *shape, dtype=torch.uint8)


def _is_frozen(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file()


def _json(content: bytes, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"Expected JSON in the facts of '{path}', found {error}. It is damaged.") from error
    if not isinstance(found, dict):
        raise FileFormatError(f"Expected a JSON object in the facts of '{path}', found {found!r:.80}.")
    return found
