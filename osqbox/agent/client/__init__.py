"""osqueryd's client side without I/O: who says what to the server, when, and what the answers change.

`Core` is the state all of an agent's threads share (`state`), and the threads. Each osqueryd thread is a generator: it
yields a command (`commands`: `Send`, `Sleep`, `Query`, `HostDetails`) and is resumed with the outcome, so it reads like
the thread it stands for, yet one driver may run it in a Trio task, another thousands of them from one heap, and a test
by hand. The driver sets ``core.now`` before each resumption; clocks, randomness and identifiers come from outside.

Where a flag names a plugin other than ``tls`` (config, logger, distributed), the core yields a `Call` instead of a
`Send`; such an agent runs the thread ``log_relay`` too.

One file for each thing that an agent does: `enrollment`, `config` and `apply`, `scheduler` (with `results`,
`decorations`, `performance`, `denylist`), `distributed`, `forwarder`; `server` has what their calls have in common.
"""

from osqbox.agent.client.apply import Random
from osqbox.agent.client.commands import Call, Command, Failure, HostDetails, Query, Send, Sleep, Thread
from osqbox.agent.client.config import ConfigUnavailable
from osqbox.agent.client.core import Core
from osqbox.agent.client.enrollment import EnrollmentFailed
from osqbox.agent.client.state import SETTINGS, TLS, Identity

__all__ = [
    "SETTINGS",
    "TLS",
    "Call",
    "Command",
    "ConfigUnavailable",
    "Core",
    "EnrollmentFailed",
    "Failure",
    "HostDetails",
    "Identity",
    "Query",
    "Random",
    "Send",
    "Sleep",
    "Thread",
]
