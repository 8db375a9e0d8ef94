"""What a runner and its instances are told, where their files are, and how the osquery program is called. Pure.

File names are Launcher's: socket and pidfile per run, the database per instance, kept over all its runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from osqbox.agent.instances.state import LAUNCH_RETRY_S
from osqbox.agent.messages import Endpoints
from osqbox.errors import BadUsage

EXTENSION = "osqbox_agent"
"""The name the extension registers, and that of its config, logger and distributed plugins."""
MAX_INSTANCES = 64
MAX_SOCKET_PATH_BYTES = 97
"""What osquery-go accepts: room for the extension's own socket, ``<manager>.<uuid>``, below the kernel's 107."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class InstanceSpec:
    """One wanted instance. Raises BadUsage for a name that cannot be part of a file's."""

    name: str
    """Its tenant's."""
    enroll_secret: str = ""
    flags: Mapping[str, str] = field(default_factory=dict)
    """Further flags for its osquery process, without dashes."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise BadUsage(
                f"expected an instance's name of letters, digits, '.', '_' and '-', got {self.name!r}",
                hint="osqbox agent --instances kolide,tenant-a",
            )


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. The defaults are quick where Launcher's, in brackets, are meant for years."""

    launch_timeout_s: float = 30.0
    """For the socket to appear and the extension to be in use (10 and 20)."""
    launch_retry_s: float = LAUNCH_RETRY_S
    health_interval_s: float = 60.0
    health_startup_delay_s: float = 60.0
    """Before the first check (600)."""
    health_tries: int = 5
    health_try_pause_s: float = 1.0
    health_timeout_s: float = 10.0
    stop_grace_s: float = 3.0
    """Between SIGTERM and SIGKILL (Launcher kills at once)."""
    query_timeout_s: float = 60.0
    config_wait_s: float = 10.0
    """How long the osquery process waits for a config at most before it gets the cached one."""
    distributed_wait_s: float = 30.0


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """How an agent's instances run."""

    tls_hostname: str
    root: Path
    server_certs: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None
    endpoints: Endpoints = field(default_factory=Endpoints)
    host_identifier: str = "hostname"
    specified_identifier: str = ""
    program: Sequence[str] = ()
    """The osquery program and its first arguments; empty is ``osqbox osqueryd`` by this Python."""
    in_process: bool = False
    """Instances are tasks of this process, which talk to the server themselves."""
    shared_client: bool = False
    """One HTTPS client for all instances instead of one each."""
    distributed_interval: int = 1
    config_refresh: int = 10
    logger_period: int = 1
    flags: Mapping[str, str] = field(default_factory=dict)
    """Further flags for every osquery process; an instance's own win over them."""
    timing: Timing = field(default_factory=Timing)

    def extension_flags(self) -> dict[str, str]:
        """The flags the extension's half of an agent core runs with: it enrolls for as long as it takes."""
        return {
            "tls_hostname": self.tls_hostname,
            "host_identifier": self.host_identifier,
            "specified_identifier": self.specified_identifier,
            "tls_enroll_max_attempts": "0",
            "tls_enroll_max_interval": "60",
            "logger_tls_period": str(self.logger_period),
            "logger_tls_backoff_max": "60",
            "disable_decorators": "true",
        }


@dataclass(frozen=True, slots=True)
class Files:
    """Where one run of an instance keeps what is its own."""

    socket: Path
    pidfile: Path
    database: Path
    extension: Path
    """Directory of the extension's store."""

    @classmethod
    def of(cls, root: Path, sockets: Path, name: str, run_id: str) -> Files:
        return cls(
            socket=sockets / f"osquery-{run_id}.sock",
            pidfile=root / f"osquery-{run_id}.pid",
            database=root / f"osquery-{name}.db",
            extension=root / f"extension-{name}",
        )

    def fits(self) -> bool:
        return len(str(self.socket).encode()) <= MAX_SOCKET_PATH_BYTES


def command_line(options: RunnerOptions, spec: InstanceSpec, files: Files) -> list[str]:
    """How the osquery process is started: everything goes through the extension, nothing over TLS of its own.

    The instance's files and plugins come last, so that no other flag can take them away.
    """
    identifier = {"host_identifier": options.host_identifier}
    if options.specified_identifier:
        identifier["specified_identifier"] = options.specified_identifier
    ours = {
        "disable_distributed": "false",
        "distributed_interval": str(options.distributed_interval),
        "config_refresh": str(options.config_refresh),
        "config_accelerated_refresh": str(options.config_refresh),
        "disable_watchdog": "true",
        "force": "true",
        **identifier,
        **options.flags,
        **spec.flags,
    }
    fixed = {
        "pidfile": str(files.pidfile),
        "database_path": str(files.database),
        "disable_extensions": "false",
        "extensions_socket": str(files.socket),
        "extensions_timeout": "20",
        "extensions_require": EXTENSION,
        "config_plugin": EXTENSION,
        "logger_plugin": EXTENSION,
        "distributed_plugin": EXTENSION,
    }
    flags = {**{name: value for name, value in ours.items() if name not in fixed}, **fixed}
    return [*options.program, *(f"--{name}={value}" for name, value in flags.items())]


def run_id(now: float, random_80_bits: int) -> str:
    """A ULID: sorts by time, 26 letters and digits."""
    alphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
    value = (int(now * 1000) << 80) | random_80_bits
    return "".join(alphabet[(value >> shift) & 31] for shift in range(125, -1, -5))
