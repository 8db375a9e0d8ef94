"""The osquery system's tables. Every column says its unit; times are seconds since the epoch."""

from __future__ import annotations

from sqlite_utils import Database, Migrations

migrations = Migrations("osquery")


@migrations()
def m001_nodes(db: Database) -> None:
    db.conn.execute(
        """CREATE TABLE osquery_nodes (
            id TEXT PRIMARY KEY,
            tenant TEXT NOT NULL REFERENCES tenants(name),
            key_digest BLOB UNIQUE,            -- SHA-256 of the node_key; NULL = blank; 16 bytes = revoked
            status TEXT NOT NULL,              -- active, pending (awaits approval), rejected
            host_identifier TEXT NOT NULL,     -- as sent at enrollment
            hostname TEXT NOT NULL,
            hardware_uuid TEXT NOT NULL,       -- system_info.uuid, "" if unknown
            instance_id TEXT NOT NULL,         -- osquery_info.instance_id: one per osquery database, "" if unknown
            platform TEXT NOT NULL,            -- os_version.platform, such as ubuntu, darwin, windows
            platform_like TEXT NOT NULL,
            os TEXT NOT NULL,                  -- name and version for people
            osquery_version TEXT NOT NULL,
            host_details TEXT NOT NULL,        -- JSON object as sent at enrollment
            tags TEXT NOT NULL,                -- JSON array, from the secret and the operator
            address TEXT NOT NULL,             -- IP address of the latest enrollment
            certificate_name TEXT,             -- set: this client certificate is required on every request
            secret_id INTEGER,                 -- tenants_secrets.id it enrolled with
            enroll_digest BLOB NOT NULL,       -- of the latest enrollment's body
            enrollments INTEGER NOT NULL,      -- how often this host has enrolled
            enrolled_at REAL NOT NULL,
            last_seen_at REAL NOT NULL,        -- written every second at most
            read_interval_s REAL               -- seconds between its latest distributed reads
        )"""
    )
    db.conn.execute("CREATE INDEX osquery_nodes_tenant ON osquery_nodes(tenant, host_identifier)")
    db.conn.execute("CREATE INDEX osquery_nodes_instance ON osquery_nodes(tenant, instance_id)")
    db.conn.execute("CREATE INDEX osquery_nodes_certificate ON osquery_nodes(certificate_name)")
    db.conn.execute(
        """CREATE TABLE osquery_last_bodies (
            node TEXT NOT NULL REFERENCES osquery_nodes(id) ON DELETE CASCADE,
            kind TEXT NOT NULL,                -- log:result, log:status
            digest BLOB NOT NULL,              -- SHA-256 of the body last stored
            connection TEXT NOT NULL,          -- the connection it came on
            at REAL NOT NULL,
            PRIMARY KEY (node, kind)
        ) WITHOUT ROWID"""
    )


@migrations()
def m002_logs(db: Database) -> None:
    db.conn.execute(
        """CREATE TABLE osquery_logs (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            tenant TEXT NOT NULL,
            node TEXT NOT NULL,
            log_type TEXT NOT NULL,            -- result, status
            name TEXT,                         -- name of the scheduled query; NULL for status lines
            action TEXT,                       -- added, removed, snapshot
            unix_time INTEGER,                 -- the agent's own clock
            received_at REAL NOT NULL,
            line TEXT NOT NULL                 -- osquery's own JSON object, one line
        )"""
    )
    db.conn.execute("CREATE INDEX osquery_logs_node ON osquery_logs(node, seq)")


@migrations()
def m003_configs(db: Database) -> None:
    db.conn.execute(
        """CREATE TABLE osquery_config_versions (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            name TEXT NOT NULL,                -- the source: a file's name or what the API calls it
            version INTEGER NOT NULL,          -- 1, 2, ... per source
            origin TEXT NOT NULL,              -- file, api
            content TEXT,                      -- JSON object; NULL = the source was removed in this version
            target TEXT NOT NULL,              -- JSON: tenants, tags, platforms, nodes
            priority INTEGER NOT NULL,
            note TEXT NOT NULL,                -- why: loaded from a path, rolled back to a version, ...
            created_at REAL NOT NULL,
            current INTEGER NOT NULL,          -- 1 = served; one per source
            UNIQUE (name, version)
        )"""
    )
    db.conn.execute("CREATE TABLE osquery_config_revision (revision INTEGER NOT NULL)")
    db.conn.execute("INSERT INTO osquery_config_revision VALUES (0)")
    db.conn.execute(
        """CREATE TABLE osquery_yara_rules (
            name TEXT NOT NULL,                -- the last path segment of its URL
            tenant TEXT NOT NULL REFERENCES tenants(name),
            content TEXT NOT NULL,             -- rule text
            public INTEGER NOT NULL,           -- 1 = plain GET without a node key is answered
            updated_at REAL NOT NULL,
            PRIMARY KEY (tenant, name)
        )"""
    )


@migrations()
def m004_campaigns(db: Database) -> None:
    db.conn.execute(
        """CREATE TABLE osquery_campaigns (
            id TEXT PRIMARY KEY,               -- also the query's name on the wire
            tenant TEXT,                       -- NULL = targets of several tenants
            sql TEXT NOT NULL,
            discovery TEXT,                    -- SQL that must return a row for the query to run
            accelerate_s INTEGER,              -- the agent polls every 5 s for this long
            created_at REAL NOT NULL,
            expires_at REAL NOT NULL,
            targets INTEGER NOT NULL,          -- how many nodes are asked
            ended INTEGER NOT NULL DEFAULT 0,  -- how many of them have ended
            ended_at REAL,                     -- set when the last target has ended
            first_at REAL,                     -- first and last answer
            last_at REAL
        )"""
    )
    db.conn.execute(
        """CREATE TABLE osquery_targets (
            campaign TEXT NOT NULL REFERENCES osquery_campaigns(id) ON DELETE CASCADE,
            node TEXT NOT NULL,
            hostname TEXT NOT NULL,            -- kept with the answer: the node may be deleted later
            state TEXT NOT NULL,               -- pending, sent | answered, failed, expired, cancelled
            offers INTEGER NOT NULL DEFAULT 0, -- how often it was read
            sent_at REAL,
            ended_at REAL,
            end_seq INTEGER,                   -- order in which the campaign's targets ended
            status INTEGER,                    -- as osquery reported it; 0 = ran
            rows TEXT,                         -- JSON array of objects
            message TEXT NOT NULL DEFAULT '',
            stats TEXT,                        -- JSON object: wall_time_ms, user_time, system_time, memory
            PRIMARY KEY (campaign, node)
        ) WITHOUT ROWID"""
    )
    db.conn.execute("CREATE INDEX osquery_targets_open ON osquery_targets(node) WHERE state IN ('pending', 'sent')")
    db.conn.execute("CREATE INDEX osquery_campaigns_open ON osquery_campaigns(expires_at) WHERE ended_at IS NULL")


@migrations()
def m005_carves(db: Database) -> None:
    db.conn.execute(
        """CREATE TABLE osquery_carves (
            session_id TEXT PRIMARY KEY,       -- chosen by the box; authorises the blocks
            tenant TEXT NOT NULL,
            node TEXT NOT NULL,
            carve_id TEXT NOT NULL,            -- chosen by the agent: carves.carve_guid
            request_id TEXT NOT NULL,
            block_count INTEGER NOT NULL,
            block_size INTEGER NOT NULL,       -- bytes before base64; the last block is shorter
            carve_size INTEGER NOT NULL,       -- bytes
            received_blocks INTEGER NOT NULL DEFAULT 0,
            state TEXT NOT NULL,               -- receiving, complete, expired; deleted = its blocks are being dropped
            sha256 TEXT,                       -- of the whole archive, once complete
            compressed INTEGER,                -- 1 = zstd, once complete
            created_at REAL NOT NULL,
            updated_at REAL NOT NULL
        )"""
    )
    db.conn.execute("CREATE INDEX osquery_carves_node ON osquery_carves(node, state)")
    db.conn.execute(
        """CREATE TABLE osquery_carve_blocks (
            session_id TEXT NOT NULL REFERENCES osquery_carves(session_id) ON DELETE CASCADE,
            block_id INTEGER NOT NULL,         -- 0-based
            data BLOB NOT NULL,
            PRIMARY KEY (session_id, block_id)
        ) WITHOUT ROWID"""
    )


@migrations()
def m006_log_bytes(db: Database) -> None:
    db.conn.execute(
        """CREATE TABLE osquery_log_size (
            bytes INTEGER NOT NULL             -- of all lines in osquery_logs, as UTF-8; one row
        )"""
    )
    db.conn.execute(
        "INSERT INTO osquery_log_size SELECT coalesce(sum(length(CAST(line AS BLOB))), 0) FROM osquery_logs"
    )
