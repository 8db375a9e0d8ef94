"""What an agent remembers, by domain and key, as osqueryd keeps it in RocksDB: in memory, or in one SQLite file."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from osqbox.errors import BadSetup


class Store(Protocol):
    def get(self, domain: str, key: str) -> str | None: ...
    def put(self, domain: str, key: str, value: str) -> None: ...
    def delete(self, domain: str, key: str) -> None: ...
    def scan(self, domain: str) -> Iterable[tuple[str, str]]:
        """Keys and values in key order."""
        ...

    def commit(self) -> None:
        """Make everything since the last commit durable."""
        ...

    def close(self) -> None: ...


class MemoryStore:
    """Forgets at the end of the process."""

    def __init__(self) -> None:
        self._domains: dict[str, dict[str, str]] = {}

    def get(self, domain: str, key: str) -> str | None:
        return self._domains.get(domain, {}).get(key)

    def put(self, domain: str, key: str, value: str) -> None:
        self._domains.setdefault(domain, {})[key] = value

    def delete(self, domain: str, key: str) -> None:
        self._domains.get(domain, {}).pop(key, None)

    def scan(self, domain: str) -> Iterable[tuple[str, str]]:
        return sorted(self._domains.get(domain, {}).items())

    def commit(self) -> None:
        pass

    def close(self) -> None:
        pass


def _open(path: Path) -> sqlite3.Connection:
    """The file, in a transaction. One agent per file: the lock is held until close."""
    db = sqlite3.connect(path, timeout=0.2, isolation_level=None)
    try:
        db.execute("PRAGMA locking_mode=EXCLUSIVE")
        db.execute("PRAGMA journal_mode=WAL")
        db.execute(
            "CREATE TABLE IF NOT EXISTS state"
            " (domain TEXT, key TEXT, value TEXT, PRIMARY KEY (domain, key)) WITHOUT ROWID"
        )
        db.execute("BEGIN IMMEDIATE")
    except sqlite3.Error:
        db.close()
        raise
    return db


class FileStore:
    """``agent.db`` in the agent's directory: one table, readable by any SQLite tool.

    Raises BadSetup when the directory cannot be used or another agent runs on it.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / "agent.db"
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._db = _open(path)
        except (OSError, sqlite3.Error) as error:
            raise BadSetup(
                f"cannot keep the agent's state in {path}: {error}",
                hint="choose another directory, or stop the agent that uses this one",
            ) from error
        self._dirty = False
        path.chmod(0o600)

    def get(self, domain: str, key: str) -> str | None:
        row = self._db.execute("SELECT value FROM state WHERE domain=? AND key=?", (domain, key)).fetchone()
        return row[0] if row else None

    def put(self, domain: str, key: str, value: str) -> None:
        self._dirty = True
        self._db.execute("INSERT OR REPLACE INTO state VALUES (?,?,?)", (domain, key, value))

    def delete(self, domain: str, key: str) -> None:
        self._dirty = True
        self._db.execute("DELETE FROM state WHERE domain=? AND key=?", (domain, key))

    def scan(self, domain: str) -> Iterable[tuple[str, str]]:
        sql = "SELECT key, value FROM state WHERE domain=? ORDER BY key"
        return [(key, value) for key, value in self._db.execute(sql, (domain,))]

    def commit(self) -> None:
        if self._dirty:
            self._db.execute("COMMIT")
            self._db.execute("BEGIN IMMEDIATE")
            self._dirty = False

    def close(self) -> None:
        if self._db.in_transaction:
            self._db.execute("COMMIT")
        self._db.close()
