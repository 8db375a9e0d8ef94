"""What a box is told at its start, and where its files are when it is told nothing."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from osqbox.forward.messages import SinkSpec

MIB = 1024 * 1024


def checkout_root() -> Path | None:
    """The folder of the checkout this package runs from, or None when it is installed."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "osqbox.py").is_file() and (root / "pyproject.toml").is_file() else None


def user_dir() -> Path:
    """Per-user data directory, by the platform's convention; ``OSQBOX_HOME`` overrides it."""
    if home := os.environ.get("OSQBOX_HOME"):
        return Path(home).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "osqbox"
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "osqbox"


def default_data_dir() -> Path:
    """Where `serve` keeps ``osqbox.db`` unless told otherwise."""
    return user_dir()


def default_certs_dir() -> Path:
    """Where the CA and keys are: ``certs/`` of a checkout, else beside the data."""
    if os.environ.get("OSQBOX_HOME"):
        return user_dir() / "certs"
    root = checkout_root()
    return root / "certs" if root and os.access(root / "certs", os.W_OK) else user_dir() / "certs"


@dataclass(frozen=True, slots=True)
class Retention:
    """How much the box keeps. What is beyond a bound is dropped oldest first, and counted."""

    log_lines: int = 1_000_000
    log_age_s: float = 30 * 86400
    log_bytes: int = 4096 * MIB
    """Of the lines themselves, as osquery wrote them."""
    events: int = 100_000
    audit_rows: int = 1_000_000
    campaigns: int = 10_000
    carve_bytes: int = 4096 * MIB
    comms_events: int = 1_000_000
    comms_commands: int = 200_000
    """Ended ones."""
    comms_batches_s: float = 86400.0
    """How long a stateful request is recognised when it is sent again."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The largest things accepted from agents."""

    body_bytes: int = 64 * MIB
    """A body on the wire: logs, query results, carve blocks."""
    small_body_bytes: int = 1 * MIB
    """A body that only carries identity: enroll, config, distributed read, carve begin."""
    decoded_bytes: int = 128 * MIB
    """A body after gunzip."""
    carve_bytes: int = 2048 * MIB
    """One carve."""


@dataclass(frozen=True, slots=True)
class JobSettings:
    """What the job runner is told."""

    host: str = "localhost"
    port: int = 9090
    user: str | None = None
    """Unix user of jobs whose certificate names no principal; None is the box's own."""


@dataclass(frozen=True, slots=True)
class ShellSettings:
    """What the shell broker is told; without these settings there is none, and its paths do not exist."""

    idle_s: float = 900.0
    """A session without input or output this long ends."""
    max_s: float = 8 * 3600.0
    record: bool = True


@dataclass(frozen=True, slots=True)
class CommsSettings:
    """What the comms API is told."""

    port: int = 27000
    socket: Path | None = None
    """Of publishers; None is ``comms.sock`` beside the database."""
    hold_s: float = 60.0
    """How long an empty long poll is held when it does not say."""
    token_lifetime_s: int = 900
    token_algorithm: str = "RS256"  # noqa: S105 - a name
    """Or ES256."""
    keys_dir: Path | None = None
    """Of the keys that sign tokens, which several boxes may share; None is beside the certificates."""
    engine_socket: Path | None = None
    """Where stateless events go; None keeps them in the database."""
    indexer_url: str | None = None
    """Of an OpenSearch that several boxes may share; None is the database."""
    indexer_ca: Path | None = None
    indexer_auth_file: Path | None = None
    """One line: ``user:password``."""


@dataclass(frozen=True, slots=True)
class Settings:
    data_dir: Path
    certs_dir: Path
    host: str = "localhost"
    agents_port: int = 8443
    operator_port: int = 8080
    operator_host: str = "127.0.0.1"
    read_hold_s: float = 12.0
    """How long an empty distributed read is held open; osqueryd gives up after 16 s. 0 answers at once."""
    client_auth: Literal["off", "optional", "required"] = "optional"
    agents_tls_min: str = "1.2"
    key_type: Literal["ec", "rsa"] = "ec"
    tls_cert: Path | None = None
    tls_key: Path | None = None
    client_ca: Path | None = None
    config_files: tuple[Path, ...] = ()
    enroll_secret: str | None = None
    """The default tenant's secret, instead of the one kept with the certificates."""
    approve: bool = False
    """Nodes of the default tenant wait for approval."""
    cert_enrollment: bool = False
    """The default tenant enrolls by TLS client certificate alone."""
    open_tenant: bool = False
    """The default tenant enrolls without a secret."""
    jobs: JobSettings | None = None
    """None: no job runner."""
    comms: CommsSettings | None = None
    """None: no comms API."""
    shells: ShellSettings | None = None
    """``serve --control``. None: no shell broker."""
    forward: tuple[SinkSpec, ...] = ()
    """Where what is recorded goes on to."""
    token: str | None = None
    """The operator token; None makes one."""
    ephemeral: bool = False
    retention: Retention = field(default_factory=Retention)
    bounds: Bounds = field(default_factory=Bounds)
