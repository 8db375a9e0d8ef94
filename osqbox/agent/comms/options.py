"""How a comms agent behaves: its dialect, its waits, its bounds, what it reports. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from osqbox.agent.comms.effects import SSE

SPIKE, G1 = "spike", "g1"
PROFILES = (SPIKE, G1)

KIB, MB = 1024, 1000 * 1000


@dataclass(frozen=True, slots=True)
class Pace:
    """Waits, as the C++ agent has them (wazuh-agent communicator.cpp, config.h); a swarm may be faster."""

    after_success_s: float = 1.0
    """g1: between an answer and the next request of the same stream."""
    again_s: float = 1.0
    """g1: after a 408."""
    retry_s: float = 30.0
    """g1: after any other failure, always the same. The spike agent backs off up to it."""
    renew_before_s: float = 2.0
    """A token is renewed so long before it expires."""
    batch_s: float = 10.0
    """An event waits at most so long for others."""
    request_s: float = 60.0
    """For one request."""
    commands_s: float = 660.0
    """g1: for a request for commands, which the server holds."""
    first_retry_s: float = 1.0
    """Spike: the first back-off."""
    wait_s: float = 60.0
    """Spike: what it asks a polled server to wait for commands."""
    silence_s: float = 60.0
    """Spike: a stream without a byte for so long is dead; servers send a sign of life every 15 to 25 s."""
    command_s: float = 600.0
    """A command may take so long."""

    def times_faster(self, factor: float) -> Pace:
        """The same with the waits between requests cut by that factor; limits stay as they are."""
        names = ("after_success_s", "again_s", "retry_s", "batch_s", "first_retry_s")
        return replace(self, **{name: getattr(self, name) / factor for name in names})


@dataclass(frozen=True, slots=True)
class Bounds:
    queue_items: int = 10_000
    """Of each queue; further events are dropped and counted."""
    batch_bytes: int = MB
    commands_kept: int = 10_000
    """Ids by which a repeated command is recognised; the oldest are forgotten."""
    upgrade_bytes: int = 1024 * MB
    configuration_bytes: int = 4 * MB


@dataclass(frozen=True, slots=True)
class Load:
    """What the agent has to tell."""

    inventory_every_s: float = 3600.0
    """0 is never."""
    inventory_items: int | None = None
    """At most so many of each collector; None is all."""
    logs_every_s: float = 5.0
    """0 is never."""
    logs_items: int = 5
    """At most so many lines each time."""


@dataclass(frozen=True, slots=True)
class Options:
    profile: str = SPIKE
    transport: str = SSE
    """The spike agent's; a g1 agent polls."""
    pace: Pace = field(default_factory=Pace)
    bounds: Bounds = field(default_factory=Bounds)
    load: Load = field(default_factory=Load)
    keep_alive: bool = True
    """Spike: one connection for its requests, beside that of the stream. A g1 agent has one for each request."""
    keep_configuration: bool = False
    """Whether configurations are kept in the store, or only their hashes."""
