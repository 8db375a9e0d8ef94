"""The shell broker's tables. Times are seconds since the epoch."""

from __future__ import annotations

from sqlite_utils import Database, Migrations

migrations = Migrations("shells")


@migrations()
def m001_sessions(db: Database) -> None:
    db.conn.execute(
        """CREATE TABLE shells_sessions (
            id TEXT PRIMARY KEY,               -- the same for agent, broker and operator
            tenant TEXT NOT NULL,
            node TEXT NOT NULL,                -- osquery_nodes.id
            hostname TEXT NOT NULL,
            state TEXT NOT NULL,               -- requested, offered, open, detached, ended
            by TEXT NOT NULL,                  -- operator who asked for it
            reason TEXT NOT NULL,              -- why, in the operator's words
            cols INTEGER NOT NULL,
            rows INTEGER NOT NULL,
            shell TEXT,                        -- wanted program, then what the agent says it runs
            user TEXT,                         -- wanted user, then what the agent says it is
            record INTEGER NOT NULL,           -- 1: output is recorded
            record_input INTEGER NOT NULL,     -- 1: input too
            protocol TEXT,                     -- shell.v1, launcher; NULL until the agent joins
            secret_digest BLOB,                -- SHA-256 of the one-time secret; NULL until it is fetched
            secret_void_at REAL,               -- when an unused secret becomes void
            secret_used INTEGER NOT NULL,      -- 1: the agent joined with it
            certificate_name TEXT,             -- client certificate it was fetched with; the same must join
            resume_digest BLOB,                -- SHA-256 of the agent's resume token
            created_at REAL NOT NULL,
            opened_at REAL,
            ended_at REAL,
            end_reason TEXT,
            exit_code INTEGER,
            signal INTEGER,
            output_bytes INTEGER NOT NULL,     -- as of the latest change of state
            recording_bytes INTEGER,           -- on disk, once ended; NULL when there is no recording
            recording_sha256 TEXT              -- of the exact output, once ended
        )"""
    )
    db.conn.execute("CREATE INDEX shells_sessions_live ON shells_sessions(node) WHERE state <> 'ended'")
    db.conn.execute("CREATE INDEX shells_sessions_created ON shells_sessions(created_at)")
    db.conn.execute("CREATE UNIQUE INDEX shells_sessions_secret ON shells_sessions(secret_digest)")
