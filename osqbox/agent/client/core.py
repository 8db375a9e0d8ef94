"""An agent: the state its threads share, and the threads. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from osqbox.agent.client.apply import Random
from osqbox.agent.client.commands import Thread
from osqbox.agent.client.config import Configuration
from osqbox.agent.client.denylist import Denylist
from osqbox.agent.client.distributed import Distributed
from osqbox.agent.client.enrollment import Enrollment
from osqbox.agent.client.forwarder import forward_logs, relay_logs
from osqbox.agent.client.scheduler import Scheduler
from osqbox.agent.client.server import Server
from osqbox.agent.client.state import Identity, State
from osqbox.agent.flags import Flags
from osqbox.agent.messages import Endpoints, Reply
from osqbox.agent.store import Store


@dataclass(frozen=True, slots=True)
class Statistics:
    enrollments: int
    config_hash: str
    queries_run: int
    answers_unsent: int
    lines_waiting: int
    lines_dropped: int


class Core(State):
    def __init__(
        self,
        identity: Identity,
        flags: Flags,
        endpoints: Endpoints,
        store: Store,
        *,
        enroll_secret: Callable[[], str],
        rng: Random,
        now: float,
    ) -> None:
        super().__init__(identity, flags, endpoints, store, now=now)
        self.denylist = Denylist(self)
        self._enrollment = Enrollment(self, enroll_secret)
        self._server = Server(self, self._enrollment)
        self._configuration = Configuration(self, self._server, rng)
        self._distributed = Distributed(self, self._server)

    # -- threads -------------------------------------------------------------------------------------------------

    def enroll(self) -> Thread[None]:
        """What the first thread does before all others. Raises EnrollmentFailed."""
        return self._enrollment.at_start()

    def first_config(self) -> Thread[None]:
        """What it does then; without a config the agent runs on."""
        yield from self.fetch_config()

    def config_refresh(self) -> Thread[None]:
        return self._configuration.refresh()

    def scheduler(self) -> Thread[None]:
        return Scheduler(self, self.denylist).run()

    def distributed(self) -> Thread[None]:
        return self._distributed.run()

    def log_forwarder(self) -> Thread[None]:
        return forward_logs(self, self._server)

    def log_relay(self) -> Thread[None]:
        return relay_logs(self)

    # -- for threads of others -----------------------------------------------------------------------------------

    def call(self, call: str, path: str, body: Callable[[str], bytes], attempts: int) -> Thread[Reply]:
        """A call of osqueryd's own API, with its retries."""
        return self._server.call(call, path, body, attempts)

    def ask(self, call: str, path: str, body: Callable[[str], bytes]) -> Thread[Reply]:
        """One call that is not of osqueryd's own API: tried once, and nobody is told when it fails."""
        return self._server.ask(call, path, body)

    def located(self, call: str, path: str) -> Thread[str]:
        """The path to send a call to, for callers that make their own `Send`."""
        return self._server.located(call, path)

    def fetch_config(self) -> Thread[bool]:
        """Ask for the config and apply it; on failure the old one stays."""
        return self._configuration.fetch()

    def push_config(self, source: str, text: str) -> None:
        """A config plugin's ``update``: the thread ``config_refresh`` takes it over."""
        self._configuration.push(source, text)

    # -- facts ---------------------------------------------------------------------------------------------------

    def statistics(self) -> Statistics:
        return Statistics(
            enrollments=self._enrollment.count,
            config_hash=self.config_hash,
            queries_run=self.queries_run,
            answers_unsent=len(self._distributed.answers),
            lines_waiting=len(self.buffer),
            lines_dropped=self.buffer.dropped + self.relayed_dropped,
        )
