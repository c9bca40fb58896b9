"""The responses that can be fetched or continued: bounded by number, bytes and age, shared by all api workers.

They are in an SQLite file of the runtime directory, so that any worker that a connection reaches knows them, and so
that they outlive a worker that dies or is replaced. The file goes when the daemon ends. Every call runs in one thread,
in the order of the calls: what was put is there for a later call, and no event loop waits for the disk or for
another worker's lock.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lightllmd.errors import NotReady

_LOCKED = 5.0  # seconds that a call waits while another worker writes
MAX_CHAIN = 4096  # responses that follow each other

_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, owner BLOB NOT NULL, previous TEXT, used REAL NOT NULL, bytes INTEGER NOT NULL,
    answer BLOB NOT NULL, input BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS responses_by_use ON responses (used);
CREATE TABLE IF NOT EXISTS items (
    owner BLOB NOT NULL, id TEXT NOT NULL, response TEXT NOT NULL REFERENCES responses (id) ON DELETE CASCADE,
    PRIMARY KEY (owner, id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS items_by_response ON items (response);
CREATE TABLE IF NOT EXISTS totals (only_row INTEGER PRIMARY KEY CHECK (only_row = 1), count INTEGER, bytes INTEGER);
INSERT OR IGNORE INTO totals VALUES (1, 0, 0);
CREATE TRIGGER IF NOT EXISTS added AFTER INSERT ON responses BEGIN
    UPDATE totals SET count = count + 1, bytes = bytes + NEW.bytes;
END;
CREATE TRIGGER IF NOT EXISTS removed AFTER DELETE ON responses BEGIN
    UPDATE totals SET count = count - 1, bytes = bytes - OLD.bytes;
END;
"""
_PRAGMAS = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = OFF;
PRAGMA foreign_keys = ON;
PRAGMA secure_delete = ON;
"""
# From a response back to the first of its conversation. One that is gone ends it.
_CHAIN = f"""
WITH RECURSIVE chain (id, previous, depth) AS (
    SELECT id, previous, 0 FROM responses WHERE id = :id AND owner = :owner AND used > :expired
    UNION ALL
    SELECT before.id, before.previous, depth + 1 FROM responses before JOIN chain ON before.id = chain.previous
    WHERE before.owner = :owner AND before.used > :expired AND depth < {MAX_CHAIN}
)
"""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Limits:
    """Of the store; a count of 0 means that nothing is kept."""

    count: int
    bytes: int
    seconds: float  # since a response was made or last continued


@dataclass(frozen=True)
class Kept:
    """A response as it is stored."""

    id: str
    previous: str | None  # the response that it continues
    answer: bytes  # JSON, as the client was told
    input: bytes  # JSON: a list of the items that it was given beside those of `previous`
    items: Sequence[str] = ()  # the ids of the items in both, by which later requests may refer to them


@dataclass(frozen=True)
class StoredResponse:
    """One response of a conversation."""

    id: str
    previous: str | None
    answer: bytes
    input: bytes


class ResponseStore:
    """Of one api worker. `owner`: whose a response is; no other owner sees it. Methods raise NotReady where the file
    can't be read or written."""

    def __init__(self, directory: str, limits: Limits, clock: Callable[[], float] = time.time) -> None:
        """`directory`: of the file; empty: it is in memory, and this worker's alone."""
        self.limits = limits
        self._file = str(Path(directory) / "responses.sqlite") if directory else ":memory:"
        self._clock = clock
        self._thread: ThreadPoolExecutor | None = None
        self._opened: sqlite3.Connection | None = None

    @property
    def on(self) -> bool:
        """Whether anything is kept."""
        return self.limits.count > 0

    async def put(self, owner: bytes, kept: Kept) -> None:
        """What is larger than the store's bytes isn't kept; those that were used the longest ago make room."""
        if self.on:
            await self._run(self._put, owner, kept)

    async def answer(self, owner: bytes, response: str) -> bytes | None:
        """JSON; None: there is none of that id, or none of that owner."""
        return await self._run(self._answer, owner, response) if self.on else None

    async def chain(self, owner: bytes, response: str, most: int) -> list[StoredResponse] | None:
        """The conversation up to `response`, the first one first, and marked as used; None: there is none of that id.
        A first one with a `previous` is one whose own is gone. Raises OverflowError where it has more than `most`
        bytes."""
        return await self._run(self._chain, owner, response, most) if self.on else None

    async def with_items(self, owner: bytes, items: Sequence[str]) -> list[StoredResponse]:
        """The responses that have items of these ids."""
        return await self._run(self._with_items, owner, items) if self.on and items else []

    async def delete(self, owner: bytes, response: str) -> bool:
        """Whether there was one."""
        return await self._run(self._delete, owner, response) if self.on else False

    def close(self) -> None:
        """For good; waits for what was put."""
        if self._thread is not None:
            self._thread.submit(self._close)
            self._thread.shutdown()

    async def _run(self, work: Callable[..., Result], *arguments: object) -> Result:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "responses")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: work(*arguments))
        except sqlite3.Error as failure:
            raise NotReady(f"the store of responses fails: {failure}", code="store_unavailable") from None

    # --- in the thread ----------------------------------------------------------------------------------------------

    @property
    def _database(self) -> sqlite3.Connection:
        if self._opened is None:
            database = sqlite3.connect(self._file, timeout=_LOCKED, isolation_level=None, check_same_thread=False)
            database.executescript(_PRAGMAS)
            database.executescript(_SCHEMA)
            self._opened = database
        return self._opened

    def _expired(self) -> float:
        return self._clock() - self.limits.seconds

    def _put(self, owner: bytes, kept: Kept) -> None:
        size = len(kept.answer) + len(kept.input)
        if size > self.limits.bytes:
            return
        database = self._database
        with _written(database):
            database.execute("DELETE FROM responses WHERE used <= ?", (self._expired(),))
            database.execute(
                "INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?)",
                (kept.id, owner, kept.previous, self._clock(), size, kept.answer, kept.input),
            )
            database.executemany(
                "INSERT OR REPLACE INTO items VALUES (?, ?, ?)", [(owner, item, kept.id) for item in kept.items]
            )
            self._make_room(database, kept.id)

    def _make_room(self, database: sqlite3.Connection, newest: str) -> None:
        while True:
            count, size = database.execute("SELECT count, bytes FROM totals").fetchone()
            if count <= self.limits.count and size <= self.limits.bytes:
                return
            database.execute(
                "DELETE FROM responses WHERE id IN "
                "(SELECT id FROM responses WHERE id != ? ORDER BY used, rowid LIMIT ?)",
                (newest, max(1, count - self.limits.count)),
            )

    def _answer(self, owner: bytes, response: str) -> bytes | None:
        found = self._database.execute(
            "SELECT answer FROM responses WHERE id = ? AND owner = ? AND used > ?", (response, owner, self._expired())
        ).fetchone()
        return None if found is None else found[0]

    def _chain(self, owner: bytes, response: str, most: int) -> list[StoredResponse] | None:
        database, names = self._database, {"id": response, "owner": owner, "expired": self._expired()}
        with _written(database):
            (size,) = database.execute(
                f"{_CHAIN} SELECT sum(bytes) FROM chain JOIN responses USING (id)", names
            ).fetchone()
            if size is None:
                return None
            if size > most:
                raise OverflowError(size)
            database.execute(
                f"{_CHAIN} UPDATE responses SET used = :now WHERE id IN (SELECT id FROM chain)",
                names | {"now": self._clock()},
            )
            rows = database.execute(
                f"{_CHAIN} SELECT chain.id, chain.previous, answer, input FROM chain JOIN responses USING (id) "
                "ORDER BY depth DESC",
                names,
            ).fetchall()
        return [StoredResponse(*row) for row in rows]

    def _with_items(self, owner: bytes, items: Sequence[str]) -> list[StoredResponse]:
        found: dict[str, StoredResponse] = {}
        for item in items:
            row = self._database.execute(
                "SELECT responses.id, previous, answer, input FROM items JOIN responses ON responses.id = response "
                "WHERE items.owner = ? AND items.id = ? AND used > ?",
                (owner, item, self._expired()),
            ).fetchone()
            if row is not None:
                found[row[0]] = StoredResponse(*row)
        return list(found.values())

    def _delete(self, owner: bytes, response: str) -> bool:
        database = self._database
        with _written(database):
            done = database.execute(
                "DELETE FROM responses WHERE id = ? AND owner = ? AND used > ?", (response, owner, self._expired())
            )
        return done.rowcount > 0

    def _close(self) -> None:
        if self._opened is not None:
            self._opened.close()


@contextmanager
def _written(database: sqlite3.Connection) -> Iterator[None]:
    """A transaction that has the right to write from its beginning, so that two workers' never wait for each other."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")
