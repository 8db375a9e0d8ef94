"""What the job runner is asked and what it answers, in its own words; gRPC, JSON and the CLI translate from here.

Times are seconds since the epoch, durations seconds, sizes bytes. Commands and arguments are bytes, as Linux has them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

KIB = 1024
MIB = 1024 * KIB

CHUNK_BYTES = 64 * KIB
"""Largest piece of output handed to a follower."""
MIXED = "mixed"
"""Stream name of a job whose stdout and stderr share one pipe."""


class State(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    SUSPENDED = "suspended"
    STOPPING = "stopping"
    EXITED = "exited"
    SIGNALED = "signaled"
    FAILED_TO_START = "failed_to_start"
    LOST = "lost"


ENDED = frozenset((State.EXITED, State.SIGNALED, State.FAILED_TO_START, State.LOST))


class Reason(StrEnum):
    """Why a job ended; its exit code or signal says how."""

    EXIT = "exit"
    STOPPED = "stopped"
    TIMEOUT = "timeout"
    OOM = "oom"
    OUTPUT_LIMIT = "output_limit"
    SHUTDOWN = "shutdown"
    LOST = "lost"


class OutputMode(StrEnum):
    SPLIT = "split"
    """Two pipes: every chunk is tagged, order is exact within a stream and as read across them."""
    MERGED = "merged"
    """One pipe: exact order, no tags."""


class Overflow(StrEnum):
    """What happens at ``max_output_bytes``."""

    KILL = "kill"
    DISCARD_NEW = "discard_new"
    KEEP_HEAD_AND_TAIL = "keep_head_and_tail"


class Containment(StrEnum):
    """How the whole tree of a job is found when it must end."""

    CGROUP = "cgroup"
    PROCESS_GROUP = "process_group"
    """Process group, subreaper and a sweep of /proc: where no cgroup is writable."""


class Stream(StrEnum):
    STDOUT = "stdout"
    STDERR = "stderr"
    MIXED = "mixed"


@dataclass(frozen=True, slots=True)
class Limits:
    """None is unlimited. What cannot be enforced here is refused, never ignored."""

    memory_bytes: int | None = None
    cpu_cores: float | None = None
    """Share of CPU time: 0.5 is half a core."""
    cpu_time_s: float | None = None
    """CPU seconds in all."""
    processes: int | None = None
    open_files: int | None = None
    file_bytes: int | None = None
    """Largest file the job may write."""


@dataclass(frozen=True, slots=True)
class JobSpec:
    """One process to run. ``command`` without a slash is looked up in the job's PATH; never through a shell."""

    command: bytes
    args: tuple[bytes, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    """Added to the clean base: PATH HOME USER LOGNAME SHELL LANG JOB_ID."""
    cwd: bytes | None = None
    """None: the home of the user it runs as."""
    run_as: str | None = None
    """A principal of the caller; None takes the first, or the server's own user."""
    limits: Limits = field(default_factory=Limits)
    timeout_s: float | None = None
    stop_grace_s: float = 10.0
    stop_signal: int = 15
    output_mode: OutputMode = OutputMode.SPLIT
    max_output_bytes: int | None = None
    """None: the server's own bound."""
    overflow: Overflow = Overflow.KEEP_HEAD_AND_TAIL
    open_stdin: bool = False
    keep_leftovers: bool = False
    """Spare background children when the command itself exits."""
    link_output: bool = False
    """Also link the output into ``~/.osqbox/jobs/`` of the user it runs as."""
    idempotency_key: str | None = None
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Usage:
    user_s: float = 0.0
    system_s: float = 0.0
    max_rss_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Status:
    """A job as everybody sees it. ``exit_code``, ``signal`` and ``errno`` exclude each other."""

    id: str
    owner: str
    """``tenant/name`` of the certificate that ran it; ``operator`` for the operator API."""
    run_as: str
    command: bytes
    args: tuple[bytes, ...]
    state: State
    created_at: float
    pid: int | None = None
    started_at: float | None = None
    ended_at: float | None = None
    exit_code: int | None = None
    signal: int | None = None
    core_dumped: bool = False
    errno: int | None = None
    """Why the command could not be started."""
    reason: Reason | None = None
    stopped_by: str | None = None
    output_bytes: int = 0
    """Of the whole log, which offsets count in."""
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    output_truncated: bool = False
    output_drained: bool = True
    """False: a leftover process still held the pipes when the log was closed."""
    usage: Usage = field(default_factory=Usage)
    containment: Containment | None = None
    enforced: tuple[str, ...] = ()
    """Limits with what enforces them: ``memory:cgroup1``, ``open_files:rlimit``."""
    leftover_processes: int = 0
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED


@dataclass(frozen=True, slots=True)
class Chunk:
    stream: Stream
    offset: int
    """Of the first byte, in the whole log."""
    data: bytes
    at: float
    """When it was read from the pipe."""


@dataclass(frozen=True, slots=True)
class Truncated:
    """Bytes ``start`` to ``end`` of the log are not kept."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class End:
    """After the last byte, and nothing after it."""

    status: Status


OutputEvent = Chunk | Truncated | End


@dataclass(frozen=True, slots=True)
class OutputRequest:
    offset: int = 0
    """Where to begin; from a ``Chunk`` seen before, its offset plus its length."""
    tail_bytes: int | None = None
    """Begin this many bytes before the end instead."""
    streams: frozenset[Stream] = frozenset()
    """Empty: all."""
    follow: bool = True
    """Go on until the job has ended; else stop at what is there now."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, as the certificate proves it (or the operator token)."""

    owner: str
    authority: str
    """Key identifier of the CA that signed the certificate: another CA's ``alice`` is somebody else."""
    roles: frozenset[str] = frozenset()
    principals: tuple[str, ...] = ()
    """Unix users this caller may run jobs as; empty: the server's own, or its ``--jobs-user``."""
    serial: int | None = None
    address: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """Newest jobs first; ``next_page`` is the ``before`` of the next call, None at the end."""

    jobs: tuple[Status, ...]
    next_page: str | None


@dataclass(frozen=True, slots=True)
class JobBounds:
    """How much the runner takes on (more is refused: RESOURCE_EXHAUSTED) and keeps (more is dropped, oldest first)."""

    running: int = 1024
    running_per_owner: int = 1000
    """One owner leaves room for the others."""
    args_bytes: int = 256 * MIB
    """Arguments of all running jobs together; they are kept in memory."""
    followers: int = 4096
    followers_per_owner: int = 2048
    output_bytes: int = 1024 * MIB
    """Largest log of one job."""
    disk_bytes: int = 16 * 1024 * MIB
    """Logs of all jobs together; beyond it no job is started."""
    free_bytes: int = 64 * MIB
    """What stays free on the disk of the logs: below it no job is started, and below half of it no log grows."""
    kept_jobs: int = 10_000
    kept_age_s: float = 30 * 86400
    kept_bytes: int = 4 * 1024 * MIB
    """Ended jobs: how many, for how long and how much of their logs is kept."""
    remembered: int = 100_000
    """Ids of removed jobs, so that their owner is told EXPIRED instead of never heard of."""


@dataclass(frozen=True, slots=True)
class JobStatistics:
    running: int
    """Jobs that have not ended, those just being started included."""
    followers: int
    started: int
    ended: int
    refused: dict[str, int]
    """By reason, since the runner was opened."""
    removed: int
    """Ended jobs that retention removed."""
    log_bytes: int
    """On disk, of all jobs."""
    capabilities: dict[str, object]
    """What this process may do for containment and limits; empty until first asked."""
