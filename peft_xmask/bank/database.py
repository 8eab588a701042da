"""The database file of a live bank: connections for threads and forked processes, transactions, errors in our words."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import FileFormatError, LockedError

_WAIT_SECONDS = 60.0


class Database:
    """One SQLite file, for any number of threads and forked processes. Each thread has a connection of its own.

    Errors of SQLite are raised as :class:`~peft_xmask.errors.LockedError`, ``OSError`` (disk full, read-only) or
    :class:`~peft_xmask.errors.FileFormatError`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._here = threading.local()
        self._process = os.getpid()
        self._connections: list[sqlite3.Connection] = []

    def one(self, query: str, *values: object) -> tuple[Any, ...] | None:
        """The first row of an answer; None if there is none."""
        found = self.all(query, *values)
        return found[0] if found else None

    def all(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """All rows of an answer."""
        with translated(self._path):
            return self._connection().execute(query, values).fetchall()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that only one process has at a time. It is committed, and on disk, at the end of the block."""
        with self._transaction("BEGIN IMMEDIATE") as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A transaction in which everything that is read belongs to one moment."""
        with self._transaction("BEGIN") as connection:
            yield connection

    def close(self) -> None:
        """Close this process's connections. The database can be used again afterwards."""
        if self._process == os.getpid():
            for connection in self._connections:
                connection.close()
        self._connections, self._here = [], threading.local()

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        connection = self._connection()
        with translated(self._path):
            connection.execute(begin)
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def _connection(self) -> sqlite3.Connection:
        """This thread's connection. A forked child makes its own and leaves those of its parent alone."""
        if self._process != os.getpid():
            self._abandoned = self._connections  # never closed here: they are the parent's
            self._process, self._connections, self._here = os.getpid(), [], threading.local()
        connection: sqlite3.Connection | None = getattr(self._here, "connection", None)
        if connection is None:
            connection = _connect(self._path)
            self._here.connection = connection
            self._connections.append(connection)
        return connection


def _connect(path: Path) -> sqlite3.Connection:
    with translated(path):
        connection = sqlite3.connect(path, timeout=_WAIT_SECONDS, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # a commit is flushed to disk before it returns
        connection.execute("PRAGMA secure_delete = ON")
    return connection


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Translate errors of SQLite into ours."""
    try:
        yield
    except sqlite3.OperationalError as error:
        text = str(error)
        if "locked" in text or "busy" in text:
            raise LockedError(f"Other processes have been writing '{path}' for {_WAIT_SECONDS:.0f} seconds.") from error
        if "full" in text:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        if "readonly" in text or "unable to open" in text:
            raise PermissionError(
                errno.EACCES, f"{text}. A live bank must be writable, for readers too", str(path)
            ) from error
        raise FileFormatError(f"'{path}' cannot be read as a live bank: {text}.") from error
    except (sqlite3.DatabaseError, UnicodeDecodeError, OverflowError) as error:
        raise FileFormatError(f"'{path}' is not a readable live bank: {error}. It is damaged.") from error
