"""Tables of the job runner. Output is never in here: it is in files beside the database."""

from __future__ import annotations

from sqlite_utils import Database, Migrations

migrations = Migrations("jobs")


@migrations()
def m001_jobs(db: Database) -> None:
    db.conn.execute(
        """CREATE TABLE jobs (
            seq INTEGER PRIMARY KEY,
            id TEXT NOT NULL UNIQUE,           -- random; also the name of the directory with the output
            owner TEXT NOT NULL,               -- who ran it, as the certificate says: tenant/name
            authority TEXT NOT NULL,           -- key identifier of the CA that says so
            tenant TEXT,
            run_as TEXT NOT NULL,              -- unix user
            command BLOB NOT NULL,
            args BLOB NOT NULL,                -- each ended by a NUL, as in /proc/PID/cmdline
            labels TEXT NOT NULL,              -- JSON object
            output_mode TEXT NOT NULL,         -- split, merged
            open_stdin INTEGER NOT NULL,
            link_output INTEGER NOT NULL,      -- 1 = also in the user's home
            idempotency_key TEXT,
            digest BLOB NOT NULL,              -- SHA-256 of the request; tells a repeated key from a reused one
            state TEXT NOT NULL,               -- pending, running, suspended, stopping; exited, signaled, ...
            created_at REAL NOT NULL,          -- seconds since the epoch, as all times here
            started_at REAL,
            ended_at REAL,                     -- NULL = has not ended
            pid INTEGER,
            exit_code INTEGER,
            signal INTEGER,
            core_dumped INTEGER NOT NULL DEFAULT 0,
            errno INTEGER,                     -- why it could not be started
            failure TEXT,                      -- JSON of the keeper: at which step it could not be started
            reason TEXT,                       -- why it ended: exit, stopped, timeout, oom, output_limit, ...
            stopped_by TEXT,
            output_bytes INTEGER NOT NULL DEFAULT 0,      -- length of the log, which offsets count in
            stdout_bytes INTEGER NOT NULL DEFAULT 0,      -- written by the job, kept or not
            stderr_bytes INTEGER NOT NULL DEFAULT 0,
            output_truncated INTEGER NOT NULL DEFAULT 0,
            output_drained INTEGER NOT NULL DEFAULT 1,
            user_s REAL NOT NULL DEFAULT 0,    -- CPU time
            system_s REAL NOT NULL DEFAULT 0,
            max_rss_bytes INTEGER NOT NULL DEFAULT 0,
            containment TEXT,                  -- cgroup, process_group
            enforced TEXT NOT NULL DEFAULT '[]',          -- JSON: limits with what enforces them
            leftover_processes INTEGER NOT NULL DEFAULT 0,
            cgroups TEXT NOT NULL DEFAULT '[]',           -- JSON: where its processes are, for ending them
            disk_bytes INTEGER NOT NULL DEFAULT 0         -- of its directory; set at the end
        )"""
    )
    db.conn.execute("CREATE INDEX jobs_created ON jobs(created_at, seq)")
    db.conn.execute("CREATE INDEX jobs_owner ON jobs(owner, authority, created_at, seq)")
    db.conn.execute("CREATE INDEX jobs_unfinished ON jobs(seq) WHERE ended_at IS NULL")
    db.conn.execute("CREATE INDEX jobs_ended ON jobs(ended_at, seq) WHERE ended_at IS NOT NULL")
    db.conn.execute(
        "CREATE UNIQUE INDEX jobs_idempotency ON jobs(owner, authority, idempotency_key) "
        "WHERE idempotency_key IS NOT NULL"
    )
    db.conn.execute(
        """CREATE TABLE jobs_removed (
            seq INTEGER PRIMARY KEY,
            id TEXT NOT NULL UNIQUE,           -- of a job that retention removed
            owner TEXT NOT NULL,
            authority TEXT NOT NULL,
            removed_at REAL NOT NULL
        )"""
    )
