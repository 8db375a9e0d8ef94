"""What a swarm is asked to do: whom to talk to, how it grows, when it fails, what goes wrong on purpose. Pure."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from osqbox.agent.messages import Endpoints
from osqbox.agent.profile.dice import Dice
from osqbox.errors import BadUsage, Unsafe

if TYPE_CHECKING:
    from osqbox.agent.shell.control import ControlOptions

Mode = Literal["steady", "ramp", "sweep"]
Connections = Literal["shared", "thread"]

MAX_AGENTS = 100_000


# -- whom to talk to ---------------------------------------------------------------------------------------------


def _std(prefix: str, read: str, write: str, start: str, block: str) -> Endpoints:
    return Endpoints(
        *(f"{prefix}/{word}" for word in ("enroll", "config", "log", read, write, start, block)),
    )


def dialects() -> Mapping[str, Endpoints]:
    """The paths of known servers. ``{prefix}`` is what stands before them in a server's URL."""
    return {
        "osqbox": Endpoints(),
        "fleet": _std("/api/osquery", "distributed/read", "distributed/write", "carve/begin", "carve/block"),
        "kolide": _std("/api/v1/osquery", "distributed/read", "distributed/write", "carve/begin", "carve/block"),
        "osctrl": _std("", "read", "write", "init", "block"),
        "zentral": _std("/public/osquery", "distributed/read", "distributed/write", "carver/start", "carver/continue"),
        "doorman": _std("", "distributed/read", "distributed/write", "start_uploads", "upload_blocks"),
        "testserver": _std("", "distributed_read", "distributed_write", "carve_init", "carve_block"),
        "goquery": _std("", "distributedRead", "distributedWrite", "carve_init", "carve_block"),
        "spasam": _std("", "read", "write", "carve_init", "carve_block"),
        "queryops": Endpoints(
            "/osquery/enroll",
            "/osquery/config",
            "/osquery/logger",
            "/osquery/distributed_read",
            "/osquery/distributed_write",
        ),
        "launcher": Endpoints(*["/"] * len(Endpoints.__slots__)),
        "uptycs": _std("/agent", "distributed_read", "distributed_write", "carve_init", "carve_block"),
    }


def endpoints(dialect: str, prefix: str, overrides: Mapping[str, str | None]) -> Endpoints:
    """The paths of ``dialect`` behind ``prefix`` (osctrl: ``/ENVIRONMENT``); ``overrides`` are whole paths by name.

    Raises BadUsage for a dialect nobody speaks and for a path without a leading slash.
    """
    known = dialects()
    if dialect not in known:
        raise BadUsage(f"expected --dialect to be one of {', '.join(known)}, got {dialect!r}")
    base = known[dialect]
    paths = {name: overrides.get(name) or f"{prefix.rstrip('/')}{getattr(base, name)}" for name in Endpoints.__slots__}
    for name, path in paths.items():
        if not path.startswith("/") or not path.isascii() or not path.isprintable() or " " in path:
            raise BadUsage(f"expected the path for {name} to start with / and to hold no blanks, got {path!r}")
    return Endpoints(**paths)


@dataclass(frozen=True, slots=True)
class Server:
    hostname: str
    """``host:port``, as ``--tls_hostname`` has it."""
    prefix: str
    """The path of the URL; "" or starting with a slash."""


def server(url: str, *, allow_remote: bool = False) -> Server:
    """Where ``https://host:port/prefix`` points.

    Raises BadUsage for anything else, Unsafe for another machine: a load test must not reach a stranger by a typo.
    """
    try:
        parts = urlsplit(url if "://" in url else f"https://{url}")
        host, port = parts.hostname, parts.port or 443
    except ValueError:
        host, port = None, 0
    if not host or parts.scheme != "https" or parts.query or parts.fragment or parts.username is not None:
        raise BadUsage(
            f"expected the server as https://HOST:PORT, got {url!r}",
            hint="osqbox swarm --server https://localhost:8443",
        )
    if not allow_remote and not is_loopback(host):
        raise Unsafe(
            f"{host} is another machine; a swarm there needs its owner's consent",
            hint=f"osqbox swarm --server {url} --allow-remote",
        )
    shown = f"[{host}]" if ":" in host else host
    return Server(f"{shown}:{port}", parts.path.rstrip("/"))


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, by its name alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


# -- what the agents are -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mix:
    """Host profiles by weight, dealt in rounds: ``ubuntu:3,windows:1`` makes every fourth host Windows."""

    round: tuple[str, ...]

    def profile(self, index: int) -> str:
        return self.round[index % len(self.round)]


def read_mix(text: str) -> Mix:
    """Raises BadUsage for a weight that is no whole number from 1 to 1000."""
    names: list[str] = []
    for entry in text.split(","):
        name, _, weight = entry.strip().partition(":")
        if not name or not (weight or "1").isdecimal() or not 1 <= int(weight or 1) <= 1000:
            raise BadUsage(f"expected profiles such as ubuntu:3,windows:1, got {text!r}")
        names += [name] * int(weight or 1)
    return Mix(tuple(names))


@dataclass(frozen=True, slots=True)
class Trouble:
    """What goes wrong on the agents' side, and how often. Shares are from 0 to 1."""

    failing_queries: float = 0.0
    """Share of queries that fail."""
    slow_writes: float = 0.0
    """Share of agents that send their requests a few bytes at a time."""
    reenroll_every_s: float = 0.0
    """All agents lose their key at once, each so many seconds; 0 is never."""
    clock_skew_s: float = 0.0
    """Each agent's clock is wrong by up to so much, either way."""
    duplicate_hardware: float = 0.0
    """Share of agents with the hardware uuid and serial number of the first one."""


class Throws:
    """`Random` for one agent in a few bytes, where `random.Random` takes 2.5 kB."""

    __slots__ = ("_count", "_dice", "_who")

    def __init__(self, dice: Dice, who: int) -> None:
        self._dice = dice
        self._who = who
        self._count = 0

    def randint(self, a: int, b: int) -> int:
        self._count += 1
        return a + self._dice.below(b - a + 1, "throw", self._who, self._count)


# -- how it grows ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Growth:
    """When agent number ``index`` starts, and when the swarm ends."""

    count: int
    spawn_rate: float
    """Agents per second."""
    duration_s: float
    """From the first agent to the end."""
    mode: Mode = "steady"
    step: int = 25
    """Sweep: so many more agents each time."""
    step_s: float = 10.0

    def starts_at_s(self, index: int) -> float:
        if self.mode == "ramp":
            return index * self.duration_s / self.count
        return index / self.spawn_rate


# -- when it fails -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Threshold:
    """``errors>0.01``, ``p95>500``, ``log.p99>=1000``, ``enrolled<1000``."""

    text: str
    metric: str
    operator: str
    value: float

    def met(self, metrics: Mapping[str, float]) -> bool:
        """A metric without a value, such as the latency of a call never made, meets nothing."""
        found = metrics.get(self.metric)
        if found is None:
            return False
        compared = {
            ">": found > self.value,
            ">=": found >= self.value,
            "<": found < self.value,
            "<=": found <= self.value,
        }
        return compared[self.operator]


_COMMS_CALLS = ("login", "stateless", "stateful", "commands", "upgrade")
_CALLS = ("enroll", "config", "log", "read", "held", "write", *_COMMS_CALLS)
_PERCENTILES = ("p50", "p95", "p99")
_COUNTS = ("errors", "agents", "enrolled", "requests", "requests_per_s", "rss_bytes", "rss_bytes_per_agent", "cpu_s")
_THRESHOLD = re.compile(r"\s*([a-z0-9_.]+)\s*(>=|<=|>|<)\s*(\d+(?:\.\d+)?)\s*")


def read_threshold(text: str) -> Threshold:
    """Raises BadUsage for a metric that is not measured."""
    known = [*_COUNTS, *_PERCENTILES, *(f"{call}.{p}" for call in _CALLS for p in _PERCENTILES)]
    found = _THRESHOLD.fullmatch(text)
    if found is None or found[1] not in known:
        raise BadUsage(
            f"expected a threshold such as errors>0.01 or p95>500, got {text!r}",
            hint=f"metrics: {', '.join((*_COUNTS, *_PERCENTILES))}, and a call's own such as log.p95",
        )
    return Threshold(text.strip(), found[1], found[2], float(found[3]))


def met(thresholds: Sequence[Threshold], metrics: Mapping[str, float]) -> list[str]:
    """Those that are met, with the value that met them."""
    return [f"{t.text} ({t.metric} is {metrics[t.metric]:g})" for t in thresholds if t.met(metrics)]


@dataclass(frozen=True, slots=True)
class SwarmPlan:
    """A whole run."""

    server: Server
    growth: Growth
    mix: Mix
    enroll_secret: str
    endpoints: Endpoints = field(default_factory=Endpoints)
    launcher: bool = False
    """Kolide Launcher's JSON-RPC instead of osquery's own API."""
    seed: int = 0
    start_time: float | None = None
    """The agents' clock at the start, in Unix seconds; None is the real one."""
    interval_s: int = 10
    """Between distributed reads."""
    config_refresh_s: int = 60
    log_period_s: int = 4
    connections: Connections = "shared"
    """``shared``: an agent's calls take turns on one connection; ``thread``: one per osqueryd thread."""
    allow_remote: bool = False
    trouble: Trouble = Trouble()
    stop_if: tuple[Threshold, ...] = ()
    """Ends a sweep."""
    flags: Mapping[str, str] = field(default_factory=dict)
    """Further osqueryd flags."""
    control: ControlOptions | None = None
    """Scripted remote shells; None asks for none."""
