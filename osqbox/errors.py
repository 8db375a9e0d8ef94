"""Every error osqbox raises on purpose.

    OsqboxError
    ├── UserError            told to a person at a terminal; carries the exit code and the next thing to type
    │   ├── BadUsage         2  the words of the call are wrong
    │   ├── BadSetup         3  a directory, certificate or configuration cannot be used
    │   ├── AddressInUse     4  a port is taken, or a box already runs on this data directory
    │   ├── NotInTime        5  waited as long as asked
    │   ├── VerdictFailed    6  an expectation did not hold
    │   └── Unsafe           7  refused because it would expose shells or data
    └── Refused              told to a peer: one HTTP answer, worded for the agent's log

The split is by blame: a UserError is ours to explain, a Refused is the peer's doing, and anything else that
escapes is a bug and is answered as an internal error without its text.
"""

from __future__ import annotations


class OsqboxError(Exception):
    """Base of all errors raised on purpose."""


class UserError(OsqboxError):
    """Something a person can mend. ``hint`` is the next command to try, paste-ready."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class BadUsage(UserError):
    exit_code = 2


class BadSetup(UserError):
    exit_code = 3


class AddressInUse(UserError):
    exit_code = 4


class NotInTime(UserError):
    exit_code = 5


class VerdictFailed(UserError):
    exit_code = 6


class Unsafe(UserError):
    exit_code = 7


class Refused(OsqboxError):
    """A request that is not served.

    ``reason`` is a short stable word that is counted and shown in metrics; ``message`` is what the peer reads in
    the ``error`` member. ``node_invalid`` tells an osquery agent to throw its key away and enroll again, so it is
    set only when the key itself is at fault.
    """

    def __init__(self, reason: str, message: str, *, status: int = 400, node_invalid: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.status = status
        self.node_invalid = node_invalid
