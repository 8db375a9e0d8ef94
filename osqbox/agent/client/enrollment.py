"""How an agent gets its node key, and loses it. Pure.

Upstream: osquery/remote/enroll/enroll.cpp, plugins/remote/enroll/tls_enroll.cpp.
"""

from __future__ import annotations

from collections.abc import Callable

from osqbox.agent import logs, messages
from osqbox.agent.client.commands import Failure, HostDetails, Send, Sleep, Thread, reply_of
from osqbox.agent.client.state import SETTINGS, TLS, State
from osqbox.errors import BadSetup

_POLL_S = 1.0


class EnrollmentFailed(BadSetup):
    """No key after every attempt. With the tls logger osqueryd exits 78 here."""

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(f"cannot enroll at {uri}: {reason}", hint="osqbox doctor")


class Enrollment:
    __slots__ = ("_refusal", "_runs", "_secret", "_state", "count")

    def __init__(self, state: State, secret: Callable[[], str]) -> None:
        self.count = 0
        """Keys received so far."""
        self._state = state
        self._secret = secret
        self._runs = False
        self._refusal = ""

    def at_start(self) -> Thread[None]:
        """What the first thread does before all others. Raises EnrollmentFailed.

        Without the tls logger, or with --disable_enrollment, the agent runs on with a blank key. Where no plugin is a
        tls one, nobody asks for a key.
        """
        state = self._state
        always = state.config_plugin == TLS and state.flags.true("enroll_always")
        if always and not state.flags.true("disable_enrollment"):
            state.store.delete(SETTINGS, "nodeKey")
        if TLS not in (state.config_plugin, state.distributed_plugin, *state.logger_plugins):
            return
        key = yield from self.node_key()
        needed = always or TLS in state.logger_plugins
        if not key and needed and not state.flags.true("disable_enrollment"):
            raise EnrollmentFailed(state.uri(state.endpoints.enroll), self._refusal)

    def node_key(self) -> Thread[str]:
        """The key; without one, this caller enrolls, one at a time, and may come back with nothing."""
        state = self._state
        while not state.node_key and self._runs:
            yield Sleep(_POLL_S, wake="enrolled")
        if not state.node_key and not state.flags.true("disable_enrollment"):
            self._runs = True
            try:
                yield from self._enroll()
            finally:
                self._runs = False
                state.wake("enrolled")
        return state.node_key

    def forget(self, used: str) -> None:
        """Drop the key a server called invalid, unless another thread has a newer one by now."""
        state = self._state
        if state.node_key == used and not state.flags.true("disable_reenrollment"):
            state.store.delete(SETTINGS, "nodeKey")
            state.event("node_invalid")

    def secret_suffix(self, path: str) -> str:
        """--tls_secret_always: the secret as a URI variable, not encoded, as upstream."""
        if not self._state.flags.true("tls_secret_always"):
            return ""
        name = self._state.flags.text("tls_enroll_override")
        return f"{'&' if '?' in path else '?'}{name}={self._secret()}"

    def _enroll(self) -> Thread[None]:
        """n^2 seconds between attempts, up to the longest pause; the last one fails silently."""
        state = self._state
        attempts = state.flags.integer("tls_enroll_max_attempts")
        longest_s = state.flags.integer("tls_enroll_max_interval")
        path = state.endpoints.enroll + self.secret_suffix(state.endpoints.enroll)
        uri = state.uri(path)
        state.verbose("tls_enroll.cpp", f"TLSEnrollPlugin requesting a node enroll key from: {uri}")
        attempt = 0
        while True:
            attempt += 1
            outcome = yield from self._ask(path)
            key = "" if isinstance(outcome, Failure) else messages.enrolled_key(outcome)
            if key:
                self._keep(key)
                return
            # Upstream names neither ``error`` nor ``node_invalid`` here; people want to know.
            self._refusal = reply_of(outcome).message or "No node key returned from TLS enroll plugin"
            state.event("enroll_failed", uri=uri, reason=self._refusal, attempt=attempt)
            if attempts and attempt >= attempts:
                return
            message = f"Failed enrollment request to {uri} ({self._refusal}) retrying..."
            state.status(logs.WARNING, "tls_enroll.cpp", message)
            yield Sleep(min(attempt**2, longest_s))

    def _ask(self, path: str) -> Thread[bytes | Failure]:
        state = self._state
        details = yield HostDetails()
        body = messages.enroll_body(
            self._secret(),
            state.host_identifier,
            details,
            secret_name=state.flags.text("tls_enroll_override"),
            platform_type=state.identity.platform_type,
        )
        outcome = yield from state.send(Send("enroll", path, body))
        return outcome

    def _keep(self, key: str) -> None:
        state = self._state
        state.store.put(SETTINGS, "nodeKey", key)
        state.store.put(SETTINGS, "nodeKeyTime", str(int(state.now)))
        self.count += 1
        state.event("enrolled", host_identifier=state.host_identifier, enrollments=self.count)
