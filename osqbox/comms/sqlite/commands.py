"""Commands on the box's own database: published, offered, answered, ended.

    pending ──note_sent──▶ sent ──code 2──▶ in_progress ──final result──▶ success │ failed
       ▲                    │
       └──not written───────┘          from any of the open three: expired │ cancelled

A command's ``seq`` is its row's number: the one writer gives it inside the transaction, so the order of numbers is the
order of publication, and AUTOINCREMENT never uses one twice.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec
from sqlite_utils import Database, Migrations

from osqbox import audit
from osqbox.clock import Clock
from osqbox.comms.errors import busy, conflict, not_found
from osqbox.comms.messages import (
    Action,
    Change,
    Command,
    CommandStatus,
    Json,
    KnownCommand,
    NewCommand,
    Result,
    ResultOutcome,
)
from osqbox.comms.publication import SEEDED
from osqbox.comms.results import judge
from osqbox.store import Store, Tx, count_dropped

from .durable import durably

EXPIRE_COMMANDS = 1000
"""At most so many expire in one transaction."""
PRUNE_COMMANDS = 5000
PUBLISHED_IDS = 20
"""An event names the commands of a publication up to so many."""
VARIABLES = 500
"""Ids in one statement; SQLite's own bound is higher everywhere."""

OPEN_COMMANDS = 1_000_000
"""Of all agents; more are refused until some have ended."""
COUNT_EVERY = 1000
"""Counting them takes a while when they are many: done once for so many published."""

OPEN = "('pending', 'sent', 'in_progress')"
OFFERED = "('pending', 'sent')"

migrations = Migrations("comms_commands")


@migrations()
def m001_commands(db: Database) -> None:
    db.conn.execute(
        """CREATE TABLE comms_commands (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,     -- order of publication, never reused: the SSE id
            id TEXT NOT NULL UNIQUE,                   -- the agents' document_id
            agent TEXT NOT NULL,                       -- uuid of the one agent it is for
            tenant TEXT NOT NULL,
            name TEXT NOT NULL,                        -- of the action
            version TEXT NOT NULL,
            args TEXT NOT NULL,                        -- JSON
            request_id TEXT NOT NULL,                  -- the same for all commands of one publication
            source TEXT NOT NULL,
            user TEXT NOT NULL,
            target_type TEXT NOT NULL,                 -- what the publication named: agent, group, all
            target_id TEXT NOT NULL,
            created_at REAL NOT NULL,                  -- seconds since the epoch, as all times here
            expires_at REAL NOT NULL,
            status TEXT NOT NULL DEFAULT 'pending',    -- as CommandStatus says
            sent_at REAL,                              -- last written to the agent
            deliveries INTEGER NOT NULL DEFAULT 0,     -- how often it was written to the agent
            answered INTEGER NOT NULL DEFAULT 0,       -- 1: a write is known to have been completed
            ended_at REAL,
            result_code INTEGER,                       -- 0 success, 1 failure, 2 in progress, 3 timeout
            result_message TEXT,
            result_data TEXT                           -- JSON
        )"""
    )
    db.conn.execute(f"CREATE INDEX comms_commands_offered ON comms_commands(agent, seq) WHERE status IN {OFFERED}")
    db.conn.execute("CREATE INDEX comms_commands_agent ON comms_commands(agent, seq)")
    db.conn.execute("CREATE INDEX comms_commands_request ON comms_commands(request_id, seq)")
    db.conn.execute(f"CREATE INDEX comms_commands_expiry ON comms_commands(expires_at) WHERE status IN {OPEN}")
    db.conn.execute("CREATE INDEX comms_commands_ended ON comms_commands(ended_at) WHERE ended_at IS NOT NULL")
    db.conn.execute(
        """CREATE TABLE comms_known_commands (
            name TEXT PRIMARY KEY,
            version TEXT NOT NULL,                     -- empty: any
            description TEXT NOT NULL,
            required_args TEXT NOT NULL                -- JSON array of names
        )"""
    )
    db.conn.executemany("INSERT INTO comms_known_commands VALUES (?, ?, ?, ?)", [_known_row(each) for each in SEEDED])


class SqliteCommands:
    """`osqbox.comms.seams.Commands`, whose docstrings hold here."""

    def __init__(self, store: Store, on_change: Callable[[Change], None], clock: Clock) -> None:
        self._store = store
        self._on_change = on_change
        self._clock = clock

    async def publish(self, commands: Sequence[NewCommand], *, actor: str) -> list[Command]:
        if not commands:
            return []
        is_bulk = len(commands) > VARIABLES
        return await durably(self._store, lambda tx: publish(tx, commands, actor, self._on_change), bulk=is_bulk)

    async def after(self, agent: str, seq: int, *, limit: int) -> list[Command]:
        now = self._clock.now()
        return self._store.peek(lambda db: offered(db, agent, seq, now, limit))

    async def known_seq(self, agent: str, seq: int) -> bool:
        if seq == 0:
            return True
        if not 0 < seq < 2**63:
            return False
        return bool(self._store.peek(lambda db: _select(db, "seq = ? AND agent = ?", (seq, agent))))

    async def note_sent(self, agent: str, ids: Sequence[str], at: float) -> None:
        await durably(self._store, lambda tx: note_sent(tx, agent, ids, at))

    async def note_answered(self, agent: str, ids: Sequence[str], *, written: bool) -> None:
        await durably(self._store, lambda tx: note_answered(tx, agent, ids, written))

    async def take_result(self, agent: str, id: str, result: Result, at: float) -> ResultOutcome:
        return await durably(self._store, lambda tx: take_result(tx, agent, id, result, at))

    async def find(self, id: str) -> Command | None:
        return next(iter(self._store.peek(lambda db: _select(db, "id = ?", (id,)))), None)

    async def page(
        self,
        *,
        tenant: str | None = None,
        agent: str | None = None,
        status: CommandStatus | None = None,
        request_id: str | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> list[Command]:
        asked = {"tenant": tenant, "agent": agent, "status": status, "request_id": request_id}
        given = {name: value for name, value in asked.items() if value is not None}
        where = " AND ".join([*(f"{name} = ?" for name in given), "seq < ?"])
        values = (*given.values(), 2**63 - 1 if before is None else before, limit)
        return await self._store.read(lambda db: _select(db, f"{where} ORDER BY seq DESC LIMIT ?", values))

    async def cancel(self, ids: Sequence[str], *, actor: str) -> list[Command]:
        return await durably(self._store, lambda tx: cancel(tx, ids, actor))

    async def expire(self, now: float) -> int:
        if not self._store.peek(lambda db: _is_expiring(db, now)):
            return 0
        return await durably(self._store, lambda tx: expire(tx, now))

    async def known(self) -> list[KnownCommand]:
        return self._store.peek(_known)

    async def put_known(self, command: KnownCommand, *, actor: str) -> None:
        await durably(self._store, lambda tx: put_known(tx, command, actor, self._on_change))

    async def remove_known(self, name: str, *, actor: str) -> None:
        await durably(self._store, lambda tx: remove_known(tx, name, actor, self._on_change))


# publishing


def publish(tx: Tx, commands: Sequence[NewCommand], actor: str, on_change: Callable[[Change], None]) -> list[Command]:
    """All or none. Raises CommsError 409 for an id that is taken, 503 when too many are open."""
    first = _next_seq(tx.db)
    _check_room(tx.db, first, len(commands))
    try:
        tx.db.executemany(
            "INSERT INTO comms_commands(seq, id, agent, tenant, name, version, args, request_id, source, user, "
            "target_type, target_id, created_at, expires_at) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
            _new_rows(first, commands),
        )
    except sqlite3.IntegrityError:
        raise conflict(_taken(tx.db, commands, first)) from None
    tell_published(tx, commands, actor)
    agents = tuple(dict.fromkeys(new.agent for new in commands))
    tenants = {new.tenant for new in commands}
    change = Change(kind="commands", agents=agents, tenant=tenants.pop() if len(tenants) == 1 else None)
    tx.after_commit.append(lambda: on_change(change))
    return [_published(seq, new) for seq, new in enumerate(commands, first)]


def _next_seq(db: sqlite3.Connection) -> int:
    """One more than AUTOINCREMENT has ever given."""
    found = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'comms_commands'").fetchone()
    return int(found[0]) + 1 if found else 1


def _check_room(db: sqlite3.Connection, first: int, wanted: int) -> None:
    if first // COUNT_EVERY == (first + wanted) // COUNT_EVERY:
        return
    is_open = f"SELECT count(*) FROM comms_commands INDEXED BY comms_commands_expiry WHERE status IN {OPEN}"
    if db.execute(is_open).fetchone()[0] + wanted > OPEN_COMMANDS:
        raise busy(f"expected at most {OPEN_COMMANDS:,} commands without a result: cancel some, or let them expire")


def _new_rows(first: int, commands: Sequence[NewCommand]) -> Iterator[tuple[Any, ...]]:
    action, args = None, ""
    for seq, new in enumerate(commands, first):
        if new.action is not action:  # one publication has one action for all its agents
            action, args = new.action, msgspec.json.encode(new.action.args).decode()
        yield (
            *(seq, new.id, new.agent, new.tenant, new.action.name, new.action.version, args),
            *(new.request_id, new.source, new.user, new.target_type, new.target_id, new.created_at, new.expires_at),
        )


def _published(seq: int, new: NewCommand) -> Command:
    return Command(
        id=new.id, seq=seq, agent=new.agent, tenant=new.tenant, action=new.action, request_id=new.request_id,
        source=new.source, user=new.user, target_type=new.target_type, target_id=new.target_id,
        created_at=new.created_at, expires_at=new.expires_at,
    )  # fmt: skip


def _taken(db: sqlite3.Connection, commands: Sequence[NewCommand], first: int) -> str:
    """Which id; rows from ``first`` on are this publication's own."""
    seen: set[str] = set()
    for new in commands:
        if new.id in seen:
            return f"expected a document_id of its own for every command, got {new.id!r} twice"
        seen.add(new.id)
        if db.execute("SELECT 1 FROM comms_commands WHERE id = ? AND seq < ?", (new.id, first)).fetchone():
            return f"expected a new document_id, got {new.id!r}, which a command has already"
    return "expected new document_ids, got one that a command has already"


def tell_published(tx: Tx, commands: Sequence[NewCommand], actor: str) -> None:
    """One event and one row of the audit for each publication, however many agents it is for."""
    publications: dict[tuple[str, str, str], list[str]] = {}
    for new in commands:
        publications.setdefault((new.request_id, new.tenant, new.action.name), []).append(new.id)
    for (request_id, tenant, name), ids in publications.items():
        tx.emit(
            "command_published", tenant=tenant, request_id=request_id, name=name, count=len(ids),
            ids=ids[:PUBLISHED_IDS],
        )  # fmt: skip
        audit.record(tx, actor, "command.publish", request_id, tenant=tenant, name=name, count=len(ids))


# delivering


def offered(db: sqlite3.Connection, agent: str, seq: int, now: float, limit: int) -> list[Command]:
    """By the index of those that are offered: an agent may have any number that have ended."""
    found = db.execute(
        f"SELECT {COLUMNS} FROM comms_commands INDEXED BY comms_commands_offered "
        f"WHERE agent = ? AND seq > ? AND status IN {OFFERED} AND expires_at > ? ORDER BY seq LIMIT ?",
        (agent, seq, now, limit),
    )
    return [_command(row) for row in found.fetchall()]


def note_sent(tx: Tx, agent: str, ids: Sequence[str], at: float) -> None:
    changed = _update(
        tx, "status = 'sent', sent_at = ?, deliveries = deliveries + 1", f"+agent = ? AND status IN {OFFERED}",
        ids, (at, agent),
    )  # fmt: skip
    if changed:
        tx.emit("command_sent", tenant=changed[0][2], agent=agent, ids=[each for _, each, _ in changed])


def note_answered(tx: Tx, agent: str, ids: Sequence[str], written: bool) -> None:
    change = "answered = 1" if written else "status = 'pending'"
    _update(tx, change, "+agent = ?" if written else "+agent = ? AND status = 'sent'", ids, (agent,))


def take_result(tx: Tx, agent: str, id: str, result: Result, at: float) -> ResultOutcome:
    found = _select(tx.db, "id = ?", (id,))
    outcome, status = judge(found[0] if found else None, agent, result)
    if status is not None:
        is_final = status is not CommandStatus.IN_PROGRESS
        tx.db.execute(
            "UPDATE comms_commands SET status = ?, ended_at = ?, result_code = ?, result_message = ?, result_data = ? "
            "WHERE id = ?",
            (status, at if is_final else None, result.code, result.message, _encoded_or_none(result.data), id),
        )
        if is_final:
            tell_ended(tx, found[0], status, result.code)
    return outcome


# ending


def cancel(tx: Tx, ids: Sequence[str], actor: str) -> list[Command]:
    return _cancel(tx, _select_ids(tx.db, ids, f"status IN {OPEN}"), actor)


def cancel_of_agent(tx: Tx, agent: str, actor: str) -> int:
    """When an agent is deleted: its open commands are cancelled. Returns how many."""
    return len(_cancel(tx, _select(tx.db, f"agent = ? AND status IN {OPEN} ORDER BY seq", (agent,)), actor))


def _cancel(tx: Tx, commands: Sequence[Command], actor: str) -> list[Command]:
    _end(tx, commands, CommandStatus.CANCELLED)
    record_cancelled(tx, commands, actor)
    return [msgspec.structs.replace(each, status=CommandStatus.CANCELLED, ended_at=tx.now) for each in commands]


def record_cancelled(tx: Tx, commands: Sequence[Command], actor: str) -> None:
    if commands:
        first = commands[0]
        audit.record(tx, actor, "command.cancel", first.id, tenant=first.tenant, count=len(commands), agent=first.agent)


def expire(tx: Tx, now: float) -> int:
    """At most EXPIRE_COMMANDS of those whose time is over; returns how many."""
    late = _select(tx.db, f"expires_at <= ? AND status IN {OPEN} ORDER BY expires_at LIMIT ?", (now, EXPIRE_COMMANDS))
    _end(tx, late, CommandStatus.EXPIRED)
    return len(late)


def _is_expiring(db: sqlite3.Connection, now: float) -> bool:
    return bool(
        db.execute(
            f"SELECT 1 FROM comms_commands WHERE expires_at <= ? AND status IN {OPEN} LIMIT 1", (now,)
        ).fetchone()
    )


def _end(tx: Tx, commands: Sequence[Command], status: CommandStatus) -> None:
    tx.db.executemany(
        "UPDATE comms_commands SET status = ?, ended_at = ? WHERE seq = ?",
        ((status, tx.now, each.seq) for each in commands),
    )
    for each in commands:
        tell_ended(tx, each, status, None)


def tell_ended(tx: Tx, command: Command, status: CommandStatus, code: int | None) -> None:
    tx.emit(
        "command_ended", tenant=command.tenant, id=command.id, agent=command.agent, name=command.action.name,
        request_id=command.request_id, status=status.value, code=code,
    )  # fmt: skip


def prune(tx: Tx, keep: int) -> int:
    """Retention: remove the ended commands beyond ``keep``, those that ended first, bounded; returns how many."""
    ended = int(tx.db.execute("SELECT count(*) FROM comms_commands WHERE ended_at IS NOT NULL").fetchone()[0])
    removed = tx.db.execute(
        "DELETE FROM comms_commands WHERE seq IN "
        "(SELECT seq FROM comms_commands WHERE ended_at IS NOT NULL ORDER BY ended_at LIMIT ?)",
        (min(max(0, ended - keep), PRUNE_COMMANDS),),
    ).rowcount
    count_dropped(tx, "comms_commands", removed)
    return removed


# known commands


def put_known(tx: Tx, command: KnownCommand, actor: str, on_change: Callable[[Change], None]) -> None:
    tx.db.execute("INSERT OR REPLACE INTO comms_known_commands VALUES (?, ?, ?, ?)", _known_row(command))
    _tell_known(tx, "command.allow", command.name, actor, on_change)


def remove_known(tx: Tx, name: str, actor: str, on_change: Callable[[Change], None]) -> None:
    """Raises CommsError 404."""
    if not tx.db.execute("DELETE FROM comms_known_commands WHERE name = ?", (name,)).rowcount:
        raise not_found(f"known command {name!r}")
    _tell_known(tx, "command.disallow", name, actor, on_change)


def _tell_known(tx: Tx, action: str, name: str, actor: str, on_change: Callable[[Change], None]) -> None:
    audit.record(tx, actor, action, name)
    tx.after_commit.append(lambda: on_change(Change(kind="known_commands")))


def _known(db: sqlite3.Connection) -> list[KnownCommand]:
    rows = db.execute("SELECT name, version, description, required_args FROM comms_known_commands ORDER BY name")
    return [
        KnownCommand(name=name, version=version, description=text, required_args=tuple(msgspec.json.decode(args)))
        for name, version, text, args in rows.fetchall()
    ]


def _known_row(known: KnownCommand) -> tuple[str, str, str, str]:
    return known.name, known.version, known.description, msgspec.json.encode(known.required_args).decode()


# rows


FACTS = (
    *("seq", "id", "agent", "tenant", "request_id", "source", "user", "target_type", "target_id", "created_at"),
    *("expires_at", "sent_at", "deliveries", "ended_at"),
)
"""Columns that are members of a `Command` as they are."""
COLUMNS = ", ".join(
    (*FACTS, "status", "answered", "name", "version", "args", "result_code", "result_message", "result_data")
)


def _select(db: sqlite3.Connection, where: str, values: Iterable[Any]) -> list[Command]:
    found = db.execute(f"SELECT {COLUMNS} FROM comms_commands WHERE {where}", tuple(values))
    return [_command(row) for row in found.fetchall()]


def _select_ids(db: sqlite3.Connection, ids: Sequence[str], where: str) -> list[Command]:
    found: list[Command] = []
    for some in _pieces(ids):
        found += _select(db, f"id IN ({_marks(some)}) AND {where} ORDER BY seq", some)
    return found


def _update(tx: Tx, change: str, where: str, ids: Sequence[str], values: tuple[Any, ...]) -> list[tuple[int, str, str]]:
    """Change the rows of these ids that fit; returns their (seq, id, tenant) in order.

    A plus sign keeps a column of ``where`` from choosing the index: the ids are to.
    """
    changed: list[tuple[int, str, str]] = []
    for some in _pieces(ids):
        changed += tx.db.execute(
            f"UPDATE comms_commands SET {change} WHERE {where} AND id IN ({_marks(some)}) RETURNING seq, id, tenant",
            (*values, *some),
        ).fetchall()
    return sorted(changed)


def _pieces(ids: Sequence[str]) -> Iterable[Sequence[str]]:
    return (ids[start : start + VARIABLES] for start in range(0, len(ids), VARIABLES))


def _marks(ids: Sequence[str]) -> str:
    return ",".join("?" * len(ids))


def _command(row: tuple[Any, ...]) -> Command:
    status, answered, name, version, args, code, message, data = row[len(FACTS) :]
    return Command(
        **dict(zip(FACTS, row, strict=False)),
        status=CommandStatus(status),
        answered=bool(answered),
        action=Action(name=name, version=version, args=msgspec.json.decode(args)),
        result=None if code is None else Result(code=code, message=message, data=_decoded_or_none(data)),
    )


def _encoded_or_none(data: Json) -> str | None:
    return None if data is None else msgspec.json.encode(data).decode()


def _decoded_or_none(text: str | None) -> Json:
    return None if text is None else msgspec.json.decode(text)
